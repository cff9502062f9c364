"""Linear maps written in letters, and layer norm.

Shape letters: B batch, L length, S key length, P patches, D width, N heads,
H head_dim, F mlp, K pixels of a patch, V vocabulary, E embedding, C classes.
"""

from collections.abc import Callable
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
    then: what is done with the product and the bias, instead of adding it.
  """

  eqn: str
  shape: tuple[int, ...]
  names: tuple[str | None, ...]
  bias: bool = True
  init_std: float | None = 0.02
  dtype: str = "float32"
  then: Callable[[jax.Array, jax.Array], jax.Array] | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    inputs, output = self.eqn.split("->")
    letters, weights = inputs.split(",")
    summed = [i for i, c in enumerate(weights) if c in letters and c not in output]
    fan_in = math.prod(self.shape[i] for i in summed)
    init = axes.boxed(axes.kernel_init(self.init_std, fan_in), *self.names)
    kernel = axes.param(self, "kernel", init, self.shape)
    y = jnp.einsum(self.eqn, x.astype(self.dtype), kernel.astype(self.dtype))
    if self.bias:
      kept = [i for i in range(len(weights)) if i not in summed]
      zeros = axes.boxed(nn.initializers.zeros_init(), *(self.names[i] for i in kept))
      bias = axes.param(self, "bias", zeros, tuple(self.shape[i] for i in kept))
      if self.then is not None:
        return self.then(y, bias)
      bias = bias.astype(self.dtype)
      if axes.platform() != "gpu":
        return y + bias
      # As one axis: what is added so, XLA has cuBLAS add within the product. A TPU lays
      # arrays of other axes out otherwise, and would copy them.
      flat = y.reshape(*y.shape[: y.ndim - len(kept)], -1)
      y = (flat + bias.reshape(-1)).reshape(y.shape)
    return y


class LayerNorm(nn.Module):
  """Layer norm over the last axis in float32, variance by two passes (as torch)."""

  eps: float = 1e-6
  dtype: str = "float32"
  bias: bool = True

  @nn.compact
  def __call__(
    self, x: jax.Array, *, fork: bool = False
  ) -> jax.Array | tuple[jax.Array, jax.Array]:
    """x [..., D]; fork: (the normed, x), for what adds to x a function of the normed.

    One kernel then adds up what flows back to either, where there are such kernels.
    """
    shape = (x.shape[-1],)
    scale = axes.param(
      self, "scale", axes.boxed(nn.initializers.ones_init(), "embed"), shape
    )
    bias = None
    if self.bias:
      zeros = axes.boxed(nn.initializers.zeros_init(), "embed")
      bias = axes.param(self, "bias", zeros, shape)
    rows = axes.kernel_rows(x, self.dtype, "act_embed")
    args = (x, scale, bias, self.eps, self.dtype)
    if rows is not None:
      return pointwise.kernel_norm(*args, rows, fork)
    y = pointwise.layer_norm(*args)
    return (y, x) if fork else y
