"""Dropout whose mask is made once, in one kernel."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.ops import prng


class Dropout(nn.Module):
  """`flax.linen.Dropout`, number for number, which XLA compiles and runs faster.

  Flax's mask is JAX's threefry, which on a CPU is a loop of a dozen kernels for each
  place that drops; `ops/prng.py` writes it out in one.

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
    key = prng.written_out(self.make_rng("dropout"))
    kept = jax.random.bernoulli(key, keep, x.shape)
    # Read forwards and backwards: not written anew into each kernel that reads it.
    kept = jax.lax.optimization_barrier(kept)
    return jax.lax.select(kept, x / keep, jnp.zeros_like(x))
