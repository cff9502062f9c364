"""Small convolutions in place of a transformer's linear patches.

Shape letters: B batch, R pixels of a side, P patches, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.nn import axes


class ConvStem(nn.Module):
  """Image [B, R, R, 3] -> [B, P, D], P = (R / patch)².

  Xiao et al. 2021 ("Early convolutions help transformers see better"): strided
  convolutions with ReLU between, channels doubling up to the width. One for each prime
  factor f of the patch, largest first: stride f, kernel 2 f - 1. Without their batch
  norm, whose statistics would tie examples of a batch together.

  Attributes:
    patch: pixels of a side that become one token, at least 2.
    width: D, to be divided by 2 for each factor but the last.
    deep: each but the first and the last is followed by one of 3 x 3 without stride.
  """

  patch: int
  width: int
  deep: bool = False
  dtype: str = "float32"

  @nn.compact
  def __call__(self, image: jax.Array) -> jax.Array:
    x = image.astype(self.dtype)
    layers = self._layers()
    for i, (factor, size, channels) in enumerate(layers):
      shape = (size, size, x.shape[-1], channels)
      # He's, as a ReLU follows.
      init = axes.kernel_init((2 / (size * size * shape[2])) ** 0.5, 0)
      names = (None, None, None, "embed") if i + 1 == len(layers) else (None,) * 4
      kernel = self.param(f"kernel_{i}", axes.boxed(init, *names), shape)
      zeros = axes.boxed(nn.initializers.zeros_init(), names[-1])
      bias = self.param(f"bias_{i}", zeros, (channels,))
      x = jax.lax.conv_general_dilated(
        jax.nn.relu(x) if i else x,
        kernel.astype(self.dtype),
        (factor, factor),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
      ) + bias.astype(self.dtype)
    return jnp.reshape(x, (x.shape[0], -1, self.width))

  def _layers(self):
    """[(stride, pixels of a side of the kernel, channels it makes), …]"""
    factors, layers = prime_factors(self.patch), []
    for i, factor in enumerate(factors):
      channels = self.width >> (len(factors) - 1 - i)
      layers.append((factor, 2 * factor - 1, channels))
      if self.deep and 0 < i < len(factors) - 1:
        layers.append((1, 3, channels))
    return layers


def prime_factors(number: int) -> list[int]:
  """[3, 2, 2] of 12: largest first."""
  factors, candidate = [], 2
  while number > 1:
    while number % candidate == 0:
      factors.append(candidate)
      number //= candidate
    candidate += 1
  return factors[::-1]
