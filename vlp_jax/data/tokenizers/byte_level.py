"""Byte-level BPE of RoBERTa and GPT-2, by the compiled tokenizers.

Radford et al. 2019, Liu et al. 2019; transformers' RobertaTokenizerFast without a space
before the text (add_prefix_space=False), as METER's official code reads captions.
"""

import dataclasses
import functools
import json
import pathlib

import huggingface_hub
import numpy as np
import tokenizers

from vlp_jax.data import vocab as vocab_lib

VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"
SPECIAL = dict(pad="<pad>", unk="<unk>", cls="<s>", sep="</s>", mask="<mask>")
SPACE = "Ġ"  # how the vocabulary writes the space before a word


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Ids of a RoBERTa vocabulary: <s> pieces </s> <pad>…; case is kept.

  Attributes:
    path: a folder with `vocab.json` and `merges.txt`, or the name of a model in the
      local Hugging Face cache ("roberta-base"). Nothing is downloaded.
    length: of a row of ids.
  """

  path: str
  length: int

  def __post_init__(self):
    vocab_lib.check_length(self.length, sep=True)
    _ = self.vocab  # a wrong file is told now, not at the first batch

  @functools.cached_property
  def _files(self):
    return find(self.path)

  @functools.cached_property
  def _ids(self):
    """{piece: id}."""
    file = self._files[0]
    try:
      ids = json.loads(file.read_text("utf-8"))
    except ValueError as error:
      raise ValueError(
        f"tokenizer.path: {file} is not a vocabulary (JSON of piece: id): {error}"
      ) from error
    missing = [name for name in SPECIAL.values() if name not in ids]
    if missing:
      raise ValueError(
        f"tokenizer.path: {file} is not RoBERTa's vocabulary: among its {len(ids)}"
        f" pieces there is no {', '.join(missing)}."
      )
    return ids

  @functools.cached_property
  def vocab(self) -> vocab_lib.Vocab:
    """Size and special ids."""
    special = {role: self._ids[name] for role, name in SPECIAL.items()}
    within = (
      i
      for piece, i in self._ids.items()
      if not piece.startswith(SPACE) and piece not in SPECIAL.values()
    )
    return vocab_lib.Vocab(
      size=max(self._ids.values()) + 1, continuation=tuple(sorted(within)), **special
    )

  @functools.cached_property
  def _compiled(self):
    vocab, merges = (str(file) for file in self._files)
    compiled = tokenizers.ByteLevelBPETokenizer.from_file(vocab, merges)
    compiled.add_special_tokens(list(SPECIAL.values()))
    return compiled

  def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """n texts -> (ids int32 [n, length], mask bool [n, length])."""
    encodings = self._compiled.encode_batch(list(texts), add_special_tokens=False)
    rows = [encoding.ids for encoding in encodings]
    return vocab_lib.pack(rows, self.vocab, length=self.length, sep=True)

  def decode(self, ids: np.ndarray) -> str:
    """The text of one row of ids, without special pieces."""
    return self._compiled.decode([int(i) for i in ids], skip_special_tokens=True)

  def pieces(self, ids: np.ndarray) -> list[str]:
    """The piece of every id of one row."""
    return [self._compiled.id_to_token(int(i)) for i in ids]


def find(path: str) -> tuple[pathlib.Path, pathlib.Path]:
  """(vocabulary, merges) that `path` means: see the field of the Tokenizer."""
  folder = pathlib.Path(path)
  files = (folder / VOCAB_FILE, folder / MERGES_FILE)
  if all(file.is_file() for file in files):
    return files
  if folder.exists():
    raise FileNotFoundError(
      f"tokenizer.path={path!r}: want a folder with {VOCAB_FILE} and {MERGES_FILE}."
    )
  if path.count("/") <= 1 and not path.startswith((".", "/", "~")):
    # Old names have moved into organisations; a cache may hold either.
    names = [path] if "/" in path else [path, f"FacebookAI/{path}"]
    for name in names:
      found = [
        huggingface_hub.try_to_load_from_cache(name, file.name) for file in files
      ]
      if all(isinstance(file, str) for file in found):
        return tuple(pathlib.Path(file) for file in found)
    raise FileNotFoundError(
      f"tokenizer.path={path!r}: neither a folder nor in the Hugging Face cache: run"
      f" `hf download {names[-1]} {VOCAB_FILE} {MERGES_FILE}` where there is a network,"
      " or give the path of a folder with both."
    )
  raise FileNotFoundError(f"tokenizer.path={path!r}: no such folder.")
