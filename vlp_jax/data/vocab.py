"""What the model has to know of a vocabulary: its size and its special ids."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Vocab:
  """Ids of a tokenizer; hashable, so that it may be a field of a Flax module.

  Attributes:
    size: number of ids; every id is in 0 … size - 1.
    pad, unk, cls, sep, mask: the special ids. Row position 0 is `cls`, but where the
      tokenizer says that it writes none; mask is None where there is none.
    dec, enc: the ids that a row has instead of `cls` where a model writes it, and where
      it reads it together with an image (BLIP); None: there are none.
    continuation: ids of pieces that continue a word (for whole-word masking).
  """

  size: int
  pad: int
  unk: int
  cls: int
  sep: int
  mask: int | None
  dec: int | None = None
  enc: int | None = None
  continuation: tuple[int, ...] = dataclasses.field(default=(), repr=False)

  @property
  def special(self) -> tuple[int, ...]:
    """The ids that stand for no text and are never masked: [UNK] is none of them."""
    ids = (self.pad, self.cls, self.sep, self.mask, self.dec, self.enc)
    return tuple(i for i in ids if i is not None)


def pack(
  rows: list[list[int]], vocab: Vocab, *, length: int, sep: bool, cls: bool = True
) -> tuple[np.ndarray, np.ndarray]:
  """Pieces of n captions -> (ids int32 [n, length], mask bool [n, length]).

  A row is [CLS] pieces [SEP] [PAD]…; a long one loses its last pieces, never its [SEP].
  Without `sep` or `cls` it has none.
  """
  ids = np.full((len(rows), length), vocab.pad, np.int32)
  mask = np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    row = [*[vocab.cls] * cls, *row[: length - cls - sep]]
    if sep:
      row.append(vocab.sep)
    ids[i, : len(row)] = row
    mask[i, : len(row)] = True
  return ids, mask


def check_length(length: int, *, sep: bool) -> None:
  """Raises ValueError where a row has no place for a piece."""
  least = 2 + sep
  if length < least:
    with_sep = " and [SEP]" if sep else ""
    raise ValueError(
      f"tokenizer.length={length}: want {least} or more, for [CLS]{with_sep} and at"
      " least one piece."
    )
