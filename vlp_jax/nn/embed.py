"""Tables that are looked up: words, positions, types."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlp_jax.nn import axes


class Embed(nn.Module):
  """A table [rows, width]; `__call__` looks ids up, `attend` scores against it.

  `start(rows, width)` is what it starts as; None: normal, of deviation `init_std`.
  """

  rows: int
  width: int
  axis: str = "vocab"
  init_std: float = 0.02
  dtype: str = "float32"
  start: Callable[[int, int], np.ndarray] | None = None

  def setup(self):
    init = axes.kernel_init(self.init_std, self.width)
    if self.start:
      init = lambda key, shape, dtype=jnp.float32: jnp.asarray(
        self.start(*shape), dtype
      )
    boxed = axes.boxed(init, self.axis, "embed")
    self.embedding = axes.param(self, "embedding", boxed, (self.rows, self.width))

  def __call__(self, ids: jax.Array) -> jax.Array:
    """ids int32 [...] -> [..., D]; an id beyond the table is an error upstream."""
    return jnp.take(self.embedding, ids, axis=0).astype(self.dtype)

  def attend(self, x: jax.Array) -> jax.Array:
    """x [..., D] -> float32 [..., rows]: the decoder tied to the table."""
    return jnp.einsum(
      "...D,VD->...V",
      x.astype(self.dtype),
      self.embedding.astype(self.dtype),
      preferred_element_type=jnp.float32,
    )
