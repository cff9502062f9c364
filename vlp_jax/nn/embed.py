"""Tables that are looked up: words, positions, types."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.nn import axes


class Embed(nn.Module):
  """A table [rows, width]; `__call__` looks ids up, `attend` scores against it."""

  rows: int
  width: int
  axis: str = "vocab"
  init_std: float = 0.02
  dtype: str = "float32"

  def setup(self):
    init = axes.boxed(axes.kernel_init(self.init_std, self.width), self.axis, "embed")
    self.embedding = self.param("embedding", init, (self.rows, self.width))

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
