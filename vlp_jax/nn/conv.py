"""Convolutions of images, channels last.

Shape letters: B batch, R rows, C columns, I channels in, O channels out.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.nn import axes


class Conv(nn.Module):
  """x [B, R, C, I] -> [B, R, C, O], with zeros around and a bias.

  Attributes:
    channels: O. size: side of the kernel, odd.
  """

  channels: int
  size: int = 1
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (self.size, self.size, x.shape[-1], self.channels)
    init = axes.kernel_init(None, self.size * self.size * x.shape[-1])
    kernel = self.param("kernel", axes.boxed(init, None, None, None, "mlp"), shape)
    zeros = axes.boxed(nn.initializers.zeros_init(), "mlp")
    bias = self.param("bias", zeros, (self.channels,))
    y = jax.lax.conv_general_dilated(
      x.astype(self.dtype),
      jnp.asarray(kernel, self.dtype),
      (1, 1),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + bias.astype(self.dtype)
