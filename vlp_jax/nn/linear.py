"""Linear maps written in letters, and layer norm.

Shape letters: B batch, L length, S key length, P patches, D width, N heads,
H head_dim, F mlp, K pixels of a patch, V vocabulary, E embedding, C classes.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.nn import axes
from vlp_jax.ops import pointwise


class Linear(nn.Module):
  """y = einsum(eqn, x, kernel) + bias.

  Linear("BLD,DNH->BLNH", (D, N, H), ("embed", "heads", "head_dim")) makes heads.
  flax's DenseGeneral cannot carry the logical axes of a three-axis kernel under
  `jax.set_mesh` (flax issue 3676), and letters are easier to read.

  Attributes:
    eqn: two operands; the letters of the second are the kernel's.
    shape: shape of the kernel, in the order of its letters.
    names: logical axis of each.
    bias: adds one of the shape of the output letters that the kernel brings.
    init_std: deviation of the kernel; None means 1 / sqrt(fan in).
    dtype: compute dtype; parameters are float32.
  """

  eqn: str
  shape: tuple[int, ...]
  names: tuple[str | None, ...]
  bias: bool = True
  init_std: float | None = 0.02
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    inputs, output = self.eqn.split("->")
    letters, weights = inputs.split(",")
    summed = [i for i, c in enumerate(weights) if c in letters and c not in output]
    fan_in = math.prod(self.shape[i] for i in summed)
    init = axes.boxed(axes.kernel_init(self.init_std, fan_in), *self.names)
    kernel = self.param("kernel", init, self.shape)
    y = jnp.einsum(self.eqn, x.astype(self.dtype), kernel.astype(self.dtype))
    if self.bias:
      kept = [i for i in range(len(weights)) if i not in summed]
      zeros = axes.boxed(nn.initializers.zeros_init(), *(self.names[i] for i in kept))
      bias = self.param("bias", zeros, tuple(self.shape[i] for i in kept))
      y = y + bias.astype(self.dtype)
    return y


class LayerNorm(nn.Module):
  """Layer norm over the last axis in float32, variance by two passes (as torch)."""

  eps: float = 1e-6
  dtype: str = "float32"
  bias: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (x.shape[-1],)
    scale = self.param("scale", axes.boxed(nn.initializers.ones_init(), "embed"), shape)
    bias = None
    if self.bias:
      zeros = axes.boxed(nn.initializers.zeros_init(), "embed")
      bias = self.param("bias", zeros, shape)
    return pointwise.layer_norm(x, scale, bias, self.eps, self.dtype)
