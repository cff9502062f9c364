"""Dropout whose mask a CPU makes once, in one kernel."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.nn import axes
from vlp_jax.ops import prng


class Dropout(nn.Module):
  """`flax.linen.Dropout`, number for number, which a CPU compiles and runs faster.

  Flax's mask is JAX's threefry, which on a CPU is a loop of a dozen kernels for each
  place that drops; `ops/prng.py` writes it out in one. On a TPU the mask is made in the
  kernels that read it, and never lies in memory: so it is left (ViLT's step on a v5e
  takes a seventh longer otherwise, by `vlp-jax plan`).

  Attributes:
    rate: chance of each number to become 0; the others are divided by 1 - rate.
  """

  rate: float

  @nn.compact
  def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
    """x of any shape and dtype; as it is where `deterministic`."""
    if deterministic or self.rate == 0.0:
      return x
    if self.rate == 1.0:
      return jnp.zeros_like(x)
    keep = 1.0 - self.rate
    key = self.make_rng("dropout")
    if axes.platform() == "cpu":
      # Read forwards and backwards: not written anew into each kernel that reads it.
      kept = jax.random.bernoulli(prng.written_out(key), keep, x.shape)
      kept = jax.lax.optimization_barrier(kept)
    else:
      kept = jax.random.bernoulli(key, keep, x.shape)
    return jax.lax.select(kept, x / keep, jnp.zeros_like(x))
