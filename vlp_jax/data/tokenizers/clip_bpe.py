"""CLIP's byte-pair encoding from its file of merges, by the compiled tokenizers.

openai/CLIP clip/simple_tokenizer.py and `clip.tokenize`: the same ids for every text.
"""

import dataclasses
import functools
import gzip
import html
import itertools
import pathlib
import re

import ftfy
import numpy as np
import tokenizers

from vlp_jax.data import vocab as vocab_lib

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
# simple_tokenizer.py: the file has more merges than are used.
MERGES = 49_152 - 256 - 2
FILE = "bpe_simple_vocab_16e6.txt.gz"
URL = f"https://github.com/openai/CLIP/raw/main/clip/{FILE}"
# Its `pat`: words, single digits, runs of other signs; the two special pieces are words
# where nothing before them takes their first sign.
WORDS = (
  r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
  r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Ids of CLIP's vocabulary of 49,408 pieces.

  A row is <|startoftext|> pieces <|endoftext|> and zeros; a long text loses its last
  pieces. There is no piece for unknown text, and none that masks. `vocab.continuation`
  is empty: whether a piece continues a word shows in the one before it, not in itself.

  Attributes:
    path: the file of merges, bpe_simple_vocab_16e6.txt.gz of openai/CLIP or open_clip,
      packed or not.
    length: of a row of ids; CLIP's is 77.
  """

  path: str
  length: int

  def __post_init__(self):
    vocab_lib.check_length(self.length, sep=True)
    _ = self._compiled  # a wrong file is told now, not at the first batch

  @functools.cached_property
  def _pairs(self):
    """The merges, best first."""
    file = pathlib.Path(self.path)
    if not file.is_file():
      raise FileNotFoundError(
        f"tokenizer.path={self.path!r}: no such file. CLIP's merges are {URL} ; the"
        " open_clip_torch package has the file as well."
      )
    try:
      data = file.read_bytes()
      data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
      lines = data.decode("utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
      raise ValueError(
        f"tokenizer.path={self.path!r} is damaged, or no file of merges: {error}"
      ) from error
    # The first line is a title.
    pairs = [tuple(line.split()) for line in lines[1 : MERGES + 1]]
    if len(pairs) < MERGES or any(len(pair) != 2 for pair in pairs):
      raise ValueError(
        f"tokenizer.path={self.path!r} is not CLIP's file of merges: want a title and"
        f" {MERGES} lines of two pieces each; get {URL}."
      )
    return pairs

  @functools.cached_property
  def _pieces(self):
    letters = list(byte_letters().values())
    ends = [letter + WORD_END for letter in letters]
    return [*letters, *ends, *map("".join, self._pairs), START, END]

  @functools.cached_property
  def vocab(self) -> vocab_lib.Vocab:
    """Size and special ids; rows are filled with 0, as `clip.tokenize` does."""
    size = len(self._pieces)
    return vocab_lib.Vocab(
      size=size, pad=0, unk=size - 1, cls=size - 2, sep=size - 1, mask=None
    )

  @functools.cached_property
  def _compiled(self):
    pieces = {piece: i for i, piece in enumerate(self._pieces)}
    try:
      model = tokenizers.models.BPE(
        pieces, list(self._pairs), end_of_word_suffix=WORD_END
      )
    except Exception as error:  # The library raises no other class.
      raise ValueError(
        f"tokenizer.path={self.path!r} is not CLIP's file of merges: {error}"
      ) from error
    compiled = tokenizers.Tokenizer(model)
    pre = tokenizers.pre_tokenizers
    compiled.pre_tokenizer = pre.Sequence(
      [self._words, pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return compiled

  @functools.cached_property
  def _words(self):
    pattern = tokenizers.Regex(WORDS)
    return tokenizers.pre_tokenizers.Split(pattern, "removed", invert=True)

  def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """n texts -> (ids int32 [n, length], mask bool [n, length])."""
    texts = [clean(text) for text in texts]
    encodings = self._compiled.encode_batch_fast(texts, add_special_tokens=False)
    rows = [encoding.ids for encoding in encodings]
    for i, text in enumerate(texts):
      if START in text or END in text:
        rows[i] = self._spelled(text)
    return vocab_lib.pack(rows, self.vocab, length=self.length, sep=True)

  def _spelled(self, text):
    """Ids of a text that spells special pieces, which are one piece each there."""
    special = {START: self.vocab.cls, END: self.vocab.sep}
    ids = []
    for word, _ in self._words.pre_tokenize_str(text):
      if word in special:
        ids.append(special[word])
      else:
        ids += self._compiled.encode(word, add_special_tokens=False).ids
    return ids

  def decode(self, ids: np.ndarray) -> str:
    """The text of one row of ids: between its start and its end, words by blanks."""
    inner = itertools.dropwhile(lambda i: i == self.vocab.cls, map(int, ids))
    inner = itertools.takewhile(lambda i: i != self.vocab.sep, inner)
    text = "".join(self._pieces[i] for i in inner)
    return _spell(text).replace(WORD_END, " ").strip()

  def pieces(self, ids: np.ndarray) -> list[str]:
    """The piece of every id of one row; the last of a word without its mark."""
    return [_spell(self._pieces[int(i)]).removesuffix(WORD_END) for i in ids]


def clean(text: str) -> str:
  """`basic_clean`, `whitespace_clean` and lower case of simple_tokenizer.py."""
  text = ftfy.fix_text(text)
  text = html.unescape(html.unescape(text)).strip()
  return re.sub(r"\s+", " ", text).strip().lower()


@functools.cache
def byte_letters() -> dict[int, str]:
  """A printing letter for every byte, in the order of the vocabulary (GPT-2's)."""
  printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printing]
  letters = {byte: chr(byte) for byte in printing}
  return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _spell(piece):
  """The text that letters for bytes stand for."""
  bytes_ = {letter: byte for byte, letter in byte_letters().items()}
  return bytes(bytes_[letter] for letter in piece).decode("utf-8", errors="replace")
