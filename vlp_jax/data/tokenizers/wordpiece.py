"""BERT's WordPiece from a vocabulary file (Devlin 2019), by the compiled tokenizers."""

import dataclasses
import functools
import pathlib

import huggingface_hub
import numpy as np
import tokenizers

from vlp_jax.data import vocab as vocab_lib

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROLES = ("[DEC]", "[ENC]")
VOCAB_FILE = "vocab.txt"
CONTINUES = "##"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Ids of a BERT vocabulary: one piece a line, its id the line's number from 0.

  Attributes:
    path: the vocabulary file, a folder with `vocab.txt`, or the name of a model in the
      local Hugging Face cache ("bert-base-uncased"). Nothing is downloaded.
    length: of a row of ids.
    lower: lower-cases and strips accents, as the uncased vocabularies want.
    sep: ends a row with [SEP]. ALBEF's official tokenizer ends a caption without
      (models/tokenization_bert.py, build_inputs_with_special_tokens).
    roles: adds [DEC] and [ENC] behind the file's pieces, as BLIP's `init_tokenizer`
      does: the first ids of a text that is written, and of one that is read with an
      image.
  """

  path: str
  length: int
  lower: bool = True
  sep: bool = True
  roles: bool = False

  def __post_init__(self):
    vocab_lib.check_length(self.length, sep=self.sep)
    _ = self._compiled  # a wrong file is told now, not at the first batch

  @functools.cached_property
  def _lines(self):
    file = find(self.path)
    try:
      lines = file.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
      raise ValueError(
        f"tokenizer.path={str(file)!r} is not a WordPiece vocabulary (one UTF-8 piece"
        f" a line): {error}"
      ) from error
    # Files made on Windows end their lines with \r\n.
    lines = [line.rstrip("\r") for line in lines]
    while lines and not lines[-1]:
      lines.pop()
    missing = [name for name in SPECIAL if name not in lines]
    if missing:
      raise ValueError(
        f"tokenizer.path={str(file)!r} is not a WordPiece vocabulary: among its"
        f" {len(lines)} lines there is no {', '.join(missing)}."
      )
    if self.roles:
      lines += [name for name in ROLES if name not in lines]
    return lines

  @functools.cached_property
  def vocab(self) -> vocab_lib.Vocab:
    """Size and special ids."""
    lines = self._lines
    special = {name.strip("[]").lower(): lines.index(name) for name in SPECIAL}
    continuation = (i for i, piece in enumerate(lines) if piece.startswith(CONTINUES))
    if self.roles:
      special |= {"dec": lines.index(ROLES[0]), "enc": lines.index(ROLES[1])}
    return vocab_lib.Vocab(size=len(lines), continuation=tuple(continuation), **special)

  @functools.cached_property
  def _compiled(self):
    pieces = {piece: i for i, piece in enumerate(self._lines)}
    model = tokenizers.models.WordPiece(
      pieces, unk_token="[UNK]", continuing_subword_prefix=CONTINUES
    )
    compiled = tokenizers.Tokenizer(model)
    compiled.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=self.lower)
    compiled.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    compiled.decoder = tokenizers.decoders.WordPiece(prefix=CONTINUES)
    # As BERT's own code, "[MASK]" in a text is the mask and not six pieces.
    compiled.add_special_tokens([*SPECIAL, *(ROLES if self.roles else ())])
    return compiled

  def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """n texts -> (ids int32 [n, length], mask bool [n, length])."""
    encodings = self._compiled.encode_batch_fast(list(texts), add_special_tokens=False)
    rows = [encoding.ids for encoding in encodings]
    return vocab_lib.pack(rows, self.vocab, length=self.length, sep=self.sep)

  def decode(self, ids: np.ndarray) -> str:
    """The text of one row of ids, without special pieces."""
    return self._compiled.decode([int(i) for i in ids], skip_special_tokens=True)

  def pieces(self, ids: np.ndarray) -> list[str]:
    """The piece of every id of one row."""
    return [self._lines[int(i)] for i in ids]


def find(path: str) -> pathlib.Path:
  """The vocabulary file that `path` means: see the field of the Tokenizer."""
  file = pathlib.Path(path)
  if file.is_dir():
    file = file / VOCAB_FILE
  if file.is_file():
    return file
  is_name = path.count("/") <= 1 and not path.startswith((".", "/", "~"))
  if is_name and not file.suffix:
    # Old names have moved into organisations; a cache may hold either.
    names = [path] if "/" in path else [path, f"google-bert/{path}"]
    for name in names:
      cached = huggingface_hub.try_to_load_from_cache(name, VOCAB_FILE)
      if isinstance(cached, str):
        return pathlib.Path(cached)
    way_out = (
      f" Neither a file nor in the Hugging Face cache: run `hf download {names[-1]}"
      f" {VOCAB_FILE}` where there is a network, or give the path of its {VOCAB_FILE}."
    )
  else:
    way_out = f" Give the path of a BERT {VOCAB_FILE}."
  raise FileNotFoundError(f"tokenizer.path={path!r}: no such vocabulary.{way_out}")
