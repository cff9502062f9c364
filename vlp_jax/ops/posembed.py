"""Tables of positions of a square grid of patches: resizing, and sin-cos.

Shape letters: P positions of a grid (G * G), D width, G grid, T new grid.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

# Of torch's bicubic; PIL and TensorFlow use -0.5.
CUBIC_A = -0.75
# How a table is resized.
How = Literal["bicubic", "antialiased", "corners", "scaled"]


def resize_posembed(
  table: jax.Array, new_grid: int, *, prefix: int = 1, how: How = "bicubic"
) -> jax.Array:
  """A learned table for another resolution, as ALBEF resizes it.

  `interpolate_pos_embed` of the official models/vit.py: bicubic with
  align_corners=False and no antialiasing; rows of tokens that are not patches stay.

  Args:
    table: float [prefix + G * G, D], patches by rows.
    new_grid: T, patches along a side.
    prefix: rows before those of the patches (1: a class token).
    how: "antialiased" is bicubic as open_clip resizes it (model.py
      `resize_pos_embed`), "corners" bilinear, corner on corner, as big_vision does
      (models/vit.py `resample_posemb`), "scaled" bicubic by a factor that is a little
      larger, as DINO and BEiT v2 do (`interpolate_pos_encoding`).

  Returns:
    float [prefix + T * T, D]; the table itself where T is G.

  Raises:
    ValueError: if the rows after the prefix are not of a square grid.
  """
  patches = table.shape[0] - prefix
  grid = math.isqrt(max(patches, 0))
  if grid < 1 or grid * grid != patches:
    raise ValueError(
      f"a position table of {table.shape[0]} rows, {prefix} of them before the patches,"
      " is not of a square grid."
    )
  if grid == new_grid:
    return table
  kept, moved = table[:prefix], table[prefix:]
  weights_TG = WEIGHTS[how](grid, new_grid)
  resized = jnp.einsum(
    "TG,UW,GWD->TUD",
    weights_TG,
    weights_TG,
    jnp.asarray(moved, jnp.float32).reshape(grid, grid, -1),
    precision=jax.lax.Precision.HIGHEST,
  )
  resized = resized.reshape(new_grid**2, -1).astype(table.dtype)
  return jnp.concatenate([kept, resized])


def bilinear(
  table: jax.Array, row_BK: jax.Array, column_BK: jax.Array, grid_B2: jax.Array
) -> jax.Array:
  """A learned table stretched to each image's own grid, corner on corner, as ViLT does.

  `torch.nn.functional.interpolate(mode="bilinear", align_corners=True)`, for grids that
  differ from image to image and are known only when it runs.

  Args:
    table: float [G * G, D], by rows.
    row_BK, column_BK: int32, places that are asked for, within the grid; what is beyond
      it has no meaning.
    grid_B2: int32, rows and columns of each image's grid.

  Returns:
    float32 [B, K, D].
  """
  side = _side(table)

  def weights(at_BK, count_B):
    step_B = (side - 1) / jnp.maximum(count_B - 1, 1)
    source_BK = at_BK * step_B[:, None]
    # Of the two neighbours each has what the other is away.
    near = 1.0 - jnp.abs(source_BK[..., None] - jnp.arange(side))
    return jnp.maximum(near, 0.0)

  return _gather(table, weights, row_BK, column_BK, grid_B2)


def antialiased(
  table: jax.Array, row_BK: jax.Array, column_BK: jax.Array, grid_B2: jax.Array
) -> jax.Array:
  """A learned table resized to each image's own grid, with a triangle filter.

  `torch.nn.functional.interpolate(mode="bilinear", antialias=True,
  align_corners=False)` (SigLIP 2), for grids that are known only when it runs: where a
  grid is smaller than the table's, each place is a mean over as much more of it.

  Args, returns: as of `bilinear`.
  """
  side = _side(table)

  def weights(at_BK, count_B):
    scale_B = side / jnp.maximum(count_B, 1).astype(jnp.float32)
    centre_BK = (at_BK + 0.5) * scale_B[:, None]
    away = jnp.abs(centre_BK[..., None] - (jnp.arange(side) + 0.5))
    near = jnp.maximum(1.0 - away / jnp.maximum(scale_B, 1.0)[:, None, None], 0.0)
    # Beyond the edge there is nothing: what is within counts for all.
    return near / jnp.maximum(near.sum(axis=-1, keepdims=True), 1e-6)

  return _gather(table, weights, row_BK, column_BK, grid_B2)


def _side(table):
  side = math.isqrt(table.shape[0])
  if side * side != table.shape[0]:
    raise ValueError(f"a position table of {table.shape[0]} rows is of no square grid.")
  return side


def _gather(table, weights, row_BK, column_BK, grid_B2):
  side = _side(table)
  return jnp.einsum(
    "BKG,BKH,GHD->BKD",
    weights(row_BK, grid_B2[:, 0]),
    weights(column_BK, grid_B2[:, 1]),
    jnp.asarray(table, jnp.float32).reshape(side, side, -1),
    precision=jax.lax.Precision.HIGHEST,
  )


def bicubic_weights(size: int, new_size: int, more: float = 0.0) -> np.ndarray:
  """float32 [new_size, size]: each new sample as a sum of old ones.

  Cubic convolution (Keys 1981) over four neighbours, those beyond the edge being the
  edge; `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`.

  more: the samples lie as if there were so many more of them than there are.
  """
  center = (np.arange(new_size) + 0.5) * (size / (new_size + more)) - 0.5
  first = np.floor(center).astype(np.int64)
  weights = np.zeros((new_size, size), np.float64)
  for offset in (-1, 0, 1, 2):
    at = np.clip(first + offset, 0, size - 1)
    # Several neighbours may be the same edge sample.
    np.add.at(weights, (np.arange(new_size), at), _cubic(center - first - offset))
  return weights.astype(np.float32)


def antialiased_weights(size: int, new_size: int) -> np.ndarray:
  """float32 [new_size, size]: as `bicubic_weights`, over more where there are fewer.

  `torch.nn.functional.interpolate(mode="bicubic", antialias=True)`: Keys's kernel as
  PIL has it, as wide as a new sample, and what is within the edge counts for all.
  """
  step = size / new_size
  center = (np.arange(new_size) + 0.5) * step
  away = np.abs(np.arange(size) + 0.5 - center[:, None]) / max(step, 1.0)
  weights = np.where(away < 2, _cubic(away, a=-0.5), 0.0)
  return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def corner_weights(size: int, new_size: int) -> np.ndarray:
  """float32 [new_size, size]: linear between two neighbours, the ends on the ends.

  `scipy.ndimage.zoom(order=1)`.
  """
  at = np.linspace(0, size - 1, new_size)
  near = 1.0 - np.abs(at[:, None] - np.arange(size))
  return np.maximum(near, 0.0).astype(np.float32)


WEIGHTS = dict(
  bicubic=bicubic_weights,
  antialiased=antialiased_weights,
  corners=corner_weights,
  # They ask torch for a factor of (T + 0.1) / G, lest rounding lose a row, and torch
  # takes the factor at its word.
  scaled=functools.partial(bicubic_weights, more=0.1),
)


def _cubic(x, a=CUBIC_A):
  x = np.abs(x)
  near = (a + 2) * x**3 - (a + 3) * x**2 + 1
  far = a * (x**3 - 5 * x**2 + 8 * x - 4)
  return np.where(x <= 1, near, far)


def sincos2d(grid: int, width: int) -> np.ndarray:
  """The fixed table of MoCo v3 and MAE: float32 [grid * grid, width], by rows.

  Columns are sin and cos of the column, then of the row, a quarter of the width each
  (MAE util/pos_embed.py, where "w goes first"), at frequencies 10000^(-4 i / width).

  Raises:
    ValueError: if the width is not a multiple of four.
  """
  if width % 4:
    raise ValueError(
      f"sincos2d positions need a width of a multiple of 4, not {width}."
    )
  omega = 10_000.0 ** (-np.arange(width // 4) / (width / 4))
  row, column = np.mgrid[:grid, :grid].reshape(2, -1, 1) * omega
  parts = [np.sin(column), np.cos(column), np.sin(row), np.cos(row)]
  return np.concatenate(parts, axis=1).astype(np.float32)


def sincos1d(rows: int, width: int) -> np.ndarray:
  """Positions in a text: float32 [rows, width], each of length 1.

  Vaswani et al. 2017 (section 3.5), sines before cosines, at the length of words that
  start with 1 / sqrt(width). Frequencies fall from 1 to 1 / 100 and not to 1 / 10000:
  a half of those would hardly change over a caption.

  Raises:
    ValueError: if the width is odd.
  """
  if width % 2:
    raise ValueError(f"sincos1d positions need an even width, not {width}.")
  half = width // 2
  angle = np.arange(rows)[:, None] * 100.0 ** (-np.arange(half) / half)
  table = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
  return (table / half**0.5).astype(np.float32)
