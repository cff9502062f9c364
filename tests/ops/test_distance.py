"""Rows of biases by distance: VLMo's definition, token by token."""

import numpy as np
import pytest

from vlp_jax.ops import distance

SIDE, WORDS = 3, 7


def slow(image, text):
  """What build_relative_position_embed of the official code says, in words.

  There the text is first; its longest, max_text_len_of_initckpt, is WORDS.
  """
  patches = (2 * SIDE - 1) ** 2
  last = patches + 3 + 2 * WORDS + 2
  tokens = [("image", i) for i in range(image)] + [("text", i) for i in range(text)]
  out = np.zeros((len(tokens), len(tokens)), int)
  for q, (kind, i) in enumerate(tokens):
    for k, (other, j) in enumerate(tokens):
      if kind != other:
        row = patches + 3 if kind == "text" else patches + 4
      else:
        base = patches + 3 if kind == "image" else last
        if i == 0 and j == 0:
          row = base - 1
        elif j == 0:
          row = base - 2
        elif i == 0:
          row = base - 3
        elif kind == "image":
          (y, x), (v, u) = divmod(i - 1, SIDE), divmod(j - 1, SIDE)
          row = (y - v + SIDE - 1) * (2 * SIDE - 1) + x - u + SIDE - 1
        else:
          row = patches + 3 + 2 + (j - i) - (2 - WORDS)
      out[q, k] = row
  return out


@pytest.mark.parametrize("image, text", [(10, 0), (0, 7), (0, 4), (10, 5)])
def test_rows(image, text):
  got = distance.index(image, text, side=SIDE, words=WORDS)
  np.testing.assert_array_equal(got, slow(image, text))
  assert got.dtype == np.int32


def test_every_row_is_of_some_distance_and_of_one_kind():
  whole = distance.index(10, WORDS, side=SIDE, words=WORDS)
  assert set(whole.flat) == set(range(distance.rows(SIDE, WORDS)))
  # VLMo base: 14 x 14 patches, 196 words.
  assert distance.rows(14, 196) == 27**2 + 3 + 2 + 2 * 196
  assert distance.side_of(distance.rows(14, 196), 196) == 14


def test_what_does_not_fit():
  with pytest.raises(ValueError, match=r"an image of 17 tokens, .* of 3 x 3 patches"):
    distance.index(17, 0, side=SIDE, words=WORDS)
  with pytest.raises(ValueError, match="a text of 8 tokens, .* are of 7"):
    distance.index(0, 8, side=SIDE, words=WORDS)
  with pytest.raises(ValueError, match="no square grid and 7 words"):
    distance.side_of(40, 7)
