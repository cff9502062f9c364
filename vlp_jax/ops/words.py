"""Words as runs of token positions."""

from collections.abc import Sequence

import numpy as np


def spans(
  ids: np.ndarray, special: Sequence[int], continuation: Sequence[int]
) -> list[list[int]]:
  """The positions of each word of one row of ids.

  A piece that continues a word belongs to the word before it. Special ids belong to no
  word, and end one:

    [CLS] a zeb ##ra [PAD]  ->  [[1], [2, 3]]

  Args:
    ids: int [L].
    special, continuation: ids, of the vocabulary.
  """
  special, continuation = frozenset(special), frozenset(continuation)
  words, inside = [], False
  for position, piece in enumerate(int(i) for i in ids):
    if piece in special:
      inside = False
    elif piece in continuation and inside:
      words[-1].append(position)
    else:
      words.append([position])
      inside = True
  return words
