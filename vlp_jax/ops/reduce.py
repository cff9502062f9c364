"""Means that are divided once, so padding, microbatches and hosts cannot skew them."""

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class Mean:
  """A sum and the weight it is to be divided by; both float32 scalars."""

  total: jax.Array
  weight: jax.Array

  @classmethod
  def of(cls, values: jax.Array, weight: jax.Array | None = None) -> "Mean":
    """The mean of `values`, each counted by `weight` (same shape; default one)."""
    values = jnp.asarray(values, jnp.float32)
    if weight is None:
      return cls(values.sum(), jnp.float32(values.size))
    weight = jnp.broadcast_to(weight, values.shape).astype(jnp.float32)
    # A weight of zero hides the value altogether, also when it is not finite.
    return cls(jnp.where(weight > 0, values * weight, 0.0).sum(), weight.sum())

  def __add__(self, other: "Mean") -> "Mean":
    return Mean(self.total + other.total, self.weight + other.weight)

  def value(self) -> jax.Array:
    """The quotient; zero where nothing was counted."""
    return self.total / jnp.maximum(self.weight, 1e-9)


def counted(means: Mapping[str, Mean]) -> dict[str, float]:
  """The values, on the host, of those in which anything was counted.

  Others say nothing of a step: of an objective that was not drawn, of no masked word.
  """
  means = jax.device_get(dict(means))
  least = np.float32(1e-9)
  return {
    key: float(np.float32(mean.total) / np.maximum(np.float32(mean.weight), least))
    for key, mean in means.items()
    if mean.weight != 0
  }
