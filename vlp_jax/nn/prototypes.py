"""Scores of learned prototypes: the head of self-distillation (DINO).

Shape letters: D width, F hidden, E bottleneck, K prototypes.
"""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.nn import axes
from vlp_jax.nn import block
from vlp_jax.nn import linear


class Prototypes(nn.Module):
  """[B, L, D] -> float32 [B, L, K]: cosines of a projection with K directions.

  Official dino/vision_transformer.py DINOHead: three layers with GELU, unit norm, and a
  last layer of unit-norm rows (weight norm whose length is fixed at 1).

  Attributes:
    count: K. hidden: F. bottleneck: E.
  """

  count: int
  hidden: int = 2048
  bottleneck: int = 256

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    act = block.ACTIVATIONS["gelu"]
    widths = (x.shape[-1], self.hidden, self.hidden, self.bottleneck)
    for i, shape in enumerate(itertools.pairwise(widths)):
      layer = linear.Linear("BLD,DF->BLF", shape, ("embed", "mlp"), name=f"dense_{i}")
      x = layer(act(x) if i else x)
    x = _unit(x.astype(jnp.float32))
    init = axes.boxed(axes.kernel_init(0.02, self.bottleneck), "vocab", "embed")
    directions = self.param("prototypes", init, (self.count, self.bottleneck))
    return jnp.einsum("BLE,KE->BLK", x, _unit(directions))


def _unit(x):
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))
