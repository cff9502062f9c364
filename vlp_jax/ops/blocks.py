"""Patches that are hidden in rectangles: BEiT's blockwise masking.

Bao et al. 2022, algorithm 1 of https://arxiv.org/abs/2106.08254: rectangles of random
size and aspect ratio are laid on the grid until so many patches are hidden. There a
loop ends when the last one fits; here all rectangles are drawn at once, and taken in
their order until the number is full, of the last one its first patches: so each image
has the same number hidden, which is a shape.

Shape letters: B batch, P patches, G side of the grid, R rectangles.
"""

import math

import jax
import jax.numpy as jnp

# Aspect ratios are 0.3 to its inverse (BEiT masking_generator.py), evenly of their log.
LOG = -math.log(0.3)
RECTANGLES = 32  # more than ever fill a grid


def hide(
  key: jax.Array, batch: int, patches: int, rate: float, *, least: int = 16
) -> jax.Array:
  """bool [B, P], `rate` of the patches of each image, mostly in rectangles.

  Args:
    key: PRNG key.
    patches: P, a square number.
    least: patches of a rectangle, before it is cut by the image's edge.

  Raises:
    ValueError: P is no square, or the share hides none or all.
  """
  side = math.isqrt(patches)
  count = round(patches * rate)
  if side * side != patches or not 0 < count < patches:
    raise ValueError(
      f"blocks of {patches} patches at rate={rate}: want a square number, and"
      " a share that hides some and not all."
    )
  area_key, aspect_key, row_key, column_key, rest_key = jax.random.split(key, 5)
  shape = (batch, RECTANGLES)
  low, high = min(least, count), count
  area = low + (high - low) * jax.random.uniform(area_key, shape)
  aspect = jnp.exp(jax.random.uniform(aspect_key, shape, minval=-LOG, maxval=LOG))
  tall = jnp.clip(jnp.round(jnp.sqrt(area * aspect)), 1, side)
  wide = jnp.clip(jnp.round(jnp.sqrt(area / aspect)), 1, side)
  top = jnp.floor(jax.random.uniform(row_key, shape) * (side - tall + 1))
  left = jnp.floor(jax.random.uniform(column_key, shape) * (side - wide + 1))
  at = jnp.arange(side)
  rows = (at >= top[..., None]) & (at < (top + tall)[..., None])
  columns = (at >= left[..., None]) & (at < (left + wide)[..., None])
  inside = (rows[..., :, None] & columns[..., None, :]).reshape(*shape, patches)
  # The number of the first rectangle that a patch lies in; others last, at random.
  first = jnp.where(inside.any(axis=1), jnp.argmax(inside, axis=1), RECTANGLES)
  noise = jax.random.uniform(rest_key, (batch, patches))
  order = jnp.where(first < RECTANGLES, first + jnp.arange(patches) / patches, first)
  order = jnp.where(first < RECTANGLES, order, RECTANGLES + noise)
  rank = jnp.argsort(jnp.argsort(order, axis=1), axis=1)
  return rank < count
