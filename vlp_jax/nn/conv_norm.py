"""Convolutions and batch norm of residual networks.

Shape letters: B batch, H height, W width, C channels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.nn import axes

# The collection of what is kept beside the parameters, part of the train state.
MEMORY = "memory"


class Conv(nn.Module):
  """Convolution without bias, [B, H, W, C] -> [B, H / stride, W / stride, D].

  Attributes:
    channels: D. size: side of the kernel, odd; the border is padded by zeros.
  """

  channels: int
  size: int = 1
  stride: int = 1
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (self.size, self.size, x.shape[-1], self.channels)
    # He's, as a ReLU follows.
    init = axes.kernel_init((2 / (self.size**2 * x.shape[-1])) ** 0.5, 0)
    kernel = self.param("kernel", axes.boxed(init, None, None, None, "embed"), shape)
    around = self.size // 2
    return jax.lax.conv_general_dilated(
      x.astype(self.dtype),
      kernel.astype(self.dtype),
      (self.stride, self.stride),
      ((around, around), (around, around)),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


class BatchNorm(nn.Module):
  """Batch norm over all but the last axis, as torch's BatchNorm2d (Ioffe 2015).

  In training the statistics are those of the global batch, whatever the mesh (torch's
  SyncBatchNorm): the mean over a sharded axis is the partitioner's to add up. Their
  running averages `mean`, `variance` and the count `batches` are in the collection
  "memory", so part of the train state, and no parameters: no gradient, no decay, no
  average over time by the teacher. A pass that does not train reads them; so does a
  teacher, who reads the live model's.

  Attributes:
    momentum: share of the new batch in the running averages.
    first_scale: what the scale begins with; 0 makes a residual block begin as the
      identity.
  """

  momentum: float = 0.1
  eps: float = 1e-5
  first_scale: float = 1.0
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    shape = (x.shape[-1],)
    constant = lambda value: axes.boxed(nn.initializers.constant(value), "embed")
    scale = self.param("scale", constant(self.first_scale), shape)
    bias = self.param("bias", constant(0.0), shape)
    running_mean = self.variable(MEMORY, "mean", jnp.zeros, shape, jnp.float32)
    running_var = self.variable(MEMORY, "variance", jnp.ones, shape, jnp.float32)
    batches = self.variable(MEMORY, "batches", lambda: jnp.int32(0))
    x = x.astype(jnp.float32)
    if train:
      mean = x.mean(axis=(0, 1, 2))
      variance = jnp.mean((x - mean) ** 2, axis=(0, 1, 2))
      if not self.is_initializing() and self.is_mutable_collection(MEMORY):
        count = x.size // x.shape[-1]
        # The batch is normed by the biased variance, remembered is the unbiased one.
        unbiased = variance * (count / max(count - 1, 1))
        for kept, new in ((running_mean, mean), (running_var, unbiased)):
          new = jax.lax.stop_gradient(new)
          kept.value = (1.0 - self.momentum) * kept.value + self.momentum * new
        batches.value = batches.value + 1
    else:
      mean, variance = running_mean.value, running_var.value
    x = (x - mean) * jax.lax.rsqrt(variance + self.eps)
    return (x * scale + bias).astype(self.dtype)


def mean_pool(x: jax.Array, size: int) -> jax.Array:
  """[B, H, W, C] -> [B, H / size, W / size, C], the mean of each square."""
  if size == 1:
    return x
  batch, height, width, channels = x.shape
  if height % size or width % size:
    raise ValueError(f"a map of {height}x{width} is not made of {size}-pixel squares.")
  x = x.reshape(batch, height // size, size, width // size, size, channels)
  return x.mean(axis=(2, 4))
