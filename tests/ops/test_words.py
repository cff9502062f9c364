"""Words as runs of positions."""

import numpy as np

from vlp_jax.ops import words

PAD, CLS, MASK, MORE = 0, 1, 2, 9


def test_pieces_join_the_word_before_them():
  ids = np.array([CLS, 5, 6, MORE, MORE, 7, PAD, PAD])
  assert words.spans(ids, (PAD, CLS), (MORE,)) == [[1], [2, 3, 4], [5]]


def test_a_special_id_ends_a_word():
  # A continuation with no word before it is a word of its own.
  ids = np.array([CLS, MORE, MASK, MORE, 5])
  assert words.spans(ids, (PAD, CLS, MASK), (MORE,)) == [[1], [3], [4]]
