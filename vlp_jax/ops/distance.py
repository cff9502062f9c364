"""Rows of a table of attention biases, by what lies between two tokens.

VLMo: official vlmo/modules/vlmo_module.py `build_relative_position_embed`; of images
alone it is BEiT's (arXiv:2106.08254, section 2.3).

Shape letters: I image tokens, T words, S of both, image first; P patches of a side.
"""

import math

import numpy as np


def rows(side: int, words: int) -> int:
  """Of a table for images of side * side patches and for texts of so many words.

  Its rows, in this order: every (down, right) between two patches, (2 * side - 1)**2 of
  them; class token to patch, patch to it, it to itself; word to image, image to word;
  every step between two words but the first, 2 * words - 3 of them; first word to
  another, another to it, it to itself.
  """
  return _patches(side) + 3 + 2 + 2 * words


def index(image: int, text: int, *, side: int, words: int) -> np.ndarray:
  """int32 [S, S]: the row of the table for each query (down) and key (across).

  Args:
    image: I, a class token and its patches by rows, or 0. text: T, or 0.
    side, words: of the table, as of `rows`.

  Raises:
    ValueError: the table is of another grid, or of shorter texts.
  """
  if image not in (0, side**2 + 1):
    raise ValueError(
      f"an image of {image} tokens, but the biases by distance are of {side} x {side}"
      " patches and a class token."
    )
  if text > words:
    raise ValueError(
      f"a text of {text} tokens, but the biases by distance are of {words}."
    )
  found = np.empty((image + text, image + text), np.int32)
  found[:image, :image] = _image(side)[:image, :image]
  found[image:, image:] = _text(text, side=side, words=words)
  found[image:, :image] = _patches(side) + 3
  found[:image, image:] = _patches(side) + 4
  return found


def _patches(side):
  return (2 * side - 1) ** 2


def _image(side):
  at_P2 = np.stack(np.divmod(np.arange(side**2), side), axis=1)
  away_PP2 = at_P2[:, None] - at_P2[None] + side - 1
  found = np.empty((side**2 + 1, side**2 + 1), np.int32)
  found[1:, 1:] = away_PP2 @ (2 * side - 1, 1)
  return _first(found, _patches(side))


def _text(text, *, side, words):
  at_T = np.arange(text)
  # Between words 1 and words - 1, the farthest that are not the first.
  start = _patches(side) + 5 + words - 2
  return _first(start + at_T[None] - at_T[:, None], rows(side, words) - 3)


def _first(found, row):
  """The first token has three rows of its own: to others, from others, to itself."""
  found[:1], found[:, :1] = row, row + 1
  found[:1, :1] = row + 2
  return found


def side_of(count: int, words: int) -> int:
  """The side of the grid of a table of `count` rows for texts of so many words.

  Raises:
    ValueError: there is none.
  """
  square = count - 5 - 2 * words
  width = math.isqrt(max(square, 0))
  if width**2 != square or width % 2 == 0:
    raise ValueError(
      f"a table of {count} biases by distance is of no square grid and {words} words."
    )
  return (width + 1) // 2
