"""Activations and layer norm whose backward pass keeps no more than their input.

What is left to automatic differentiation keeps every intermediate array, in float32:
on an accelerator, writing and reading them takes longer than computing them again.

Shape letters: B batch, L length, D width.
"""

from collections.abc import Callable
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

Pointwise = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Rows:
  """That the kernels of `ops/kernels.py` are to be used for rows [..., D].

  Attributes:
    spread: for each axis of the array, the axes of the mesh (`jax.set_mesh`) that it is
      split over.
    interpret: by JAX, on any device.
  """

  spread: tuple[tuple[str, ...], ...]
  interpret: bool = False

  def call(self, kernel, arrays, whole, sums):
    """`kernel(*arrays, *whole)` where the arrays are, each as rows [R, D].

    Args:
      arrays: [..., D], split as `spread` says. whole: [D], split as its last axis.
      sums: how many results there are behind the first, which is of rows; they are [D],
        summed over all rows.
    """
    split = PartitionSpec(*(axes or None for axes in self.spread))
    last = PartitionSpec(self.spread[-1] or None)
    over = tuple(axis for axes in self.spread[:-1] for axis in axes)

    def here(arrays, whole):
      shape = arrays[0].shape
      rows = [a.reshape(-1, shape[-1]) for a in arrays]
      out, *totals = kernel(*rows, *whole, interpret=self.interpret)
      return out.reshape(shape), [jax.lax.psum(t, over) if over else t for t in totals]

    if any(self.spread):
      specs = dict(in_specs=(split, last), out_specs=(split, [last] * sums))
      here = jax.shard_map(here, check_vma=False, **specs)
    return here(arrays, whole)


def _kernels():
  # Here, not above: a start without a GPU need not wait for Triton.
  from vlp_jax.ops import kernels

  return kernels


class Activation:
  """A function of each number, computed in float32, whose input alone is kept.

  slope: its derivative, of what a kernel can compute; None: that of `forward`.
  """

  def __init__(self, forward: Pointwise, slope: Pointwise | None = None):
    if slope is None:
      slope = lambda x: jax.vjp(forward, x)[1](jnp.ones_like(x))[0]

    @jax.custom_vjp
    def call(x):
      return forward(x.astype(jnp.float32)).astype(x.dtype)

    def pull(x, grad):
      # Behind the barrier, what rematerialisation makes once more is not taken for one
      # array with what is made here, to be written out and read again.
      x, grad = jax.lax.optimization_barrier((x, grad))
      _, vjp = jax.vjp(forward, x.astype(jnp.float32))
      (out,) = vjp(grad.astype(jnp.float32))
      return (out.astype(x.dtype),)

    call.defvjp(lambda x: (call(x), x), pull)
    self._call = call

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def biased(x, bias, rows):
      return forward(x.astype(jnp.float32) + bias).astype(x.dtype)

    def biased_pull(rows, kept, grad):
      x, bias = jax.lax.optimization_barrier(kept)

      def kernel(x, grad, bias, interpret):
        return _kernels().activation_back(slope, x, bias, grad, interpret=interpret)

      out, (of_bias,) = rows.call(kernel, (x, grad), (bias,), sums=1)
      return out, of_bias

    biased.defvjp(lambda x, bias, rows: (biased(x, bias, rows), (x, bias)), biased_pull)
    self._biased = biased

  def __call__(self, x: jax.Array) -> jax.Array:
    """x float [...], of any type."""
    return self._call(x)

  def biased(self, x: jax.Array, bias: jax.Array, rows: Rows) -> jax.Array:
    """Of x [..., D] + bias float32 [D], in the type of x; by a kernel backwards."""
    return self._biased(x, bias, rows)


def _gelu_slope(x):
  """Normal cumulative function and x times the density, of 1.5e-7 at most beside it.

  By one exponential for both: Abramowitz & Stegun 1964, 7.1.26. Pallas has no erf.
  """
  density = jnp.exp(-0.5 * x * x)
  t = 1.0 / (1.0 + 0.3275911 * math.sqrt(0.5) * jnp.abs(x))
  tail = 0.0
  for factor in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
    tail = t * (tail + factor)
  tail = 0.5 * tail * density
  return jnp.where(x < 0, tail, 1.0 - tail) + x * density * math.sqrt(0.5 / math.pi)


# Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415: x times the normal
# distribution's cumulative function; `tanh` is their approximation. By erf, as torch
# has it: erfc, which jax.nn.gelu takes, is three times the work.
gelu = Activation(
  lambda x: 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5))), _gelu_slope
)
gelu_tanh = Activation(lambda x: jax.nn.gelu(x, approximate=True))
# OpenAI CLIP, model.py QuickGELU.
quick_gelu = Activation(lambda x: x * jax.nn.sigmoid(1.702 * x))
silu = Activation(jax.nn.silu)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(
  x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float, dtype: str
) -> jax.Array:
  """Layer norm over the last axis, in float32, variance by two passes (as torch).

  x float [..., D], scale and bias float32 [D]; returns [..., D] of `dtype`.
  """
  return _normed(x, scale, bias, eps, dtype)[0]


def _normed(x, scale, bias, eps, dtype):
  x = x.astype(jnp.float32)
  mean = x.mean(axis=-1, keepdims=True)
  x = x - mean
  variance = jnp.mean(x * x, axis=-1, keepdims=True)
  inverse = jax.lax.rsqrt(variance + eps)
  y = x * inverse * scale
  y = y if bias is None else y + bias
  return y.astype(dtype), mean, inverse


def _forward(x, scale, bias, eps, dtype):
  y, mean, inverse = _normed(x, scale, bias, eps, dtype)
  return y, (x, scale, bias, mean, inverse)


def _backward(eps, dtype, kept, grad_in):
  del eps, dtype
  x, scale, bias, mean, inverse = kept
  grad = grad_in.astype(jnp.float32)
  unit = (x.astype(jnp.float32) - mean) * inverse
  inner = grad * scale
  along = jnp.mean(inner * unit, axis=-1, keepdims=True)
  out = inverse * (inner - jnp.mean(inner, axis=-1, keepdims=True) - unit * along)
  rows = tuple(range(x.ndim - 1))
  # Behind the barrier, XLA sums over rows what it reads again, and writes no product of
  # the whole array out.
  x_again, grad = jax.lax.optimization_barrier((x, grad_in))
  grad = grad.astype(jnp.float32)
  of_scale = jnp.sum(grad * (x_again.astype(jnp.float32) - mean) * inverse, axis=rows)
  of_bias = None if bias is None else jnp.sum(grad, axis=rows)
  return out.astype(x.dtype), of_scale, of_bias


layer_norm.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def kernel_norm(
  x: jax.Array,
  scale: jax.Array,
  bias: jax.Array | None,
  eps: float,
  dtype: str,
  rows: Rows,
  fork: bool,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """`layer_norm` by a kernel; fork: (it, x), and what flows back to x is added in it.

  What computes x + f(norm(x)) then has no pass over memory for that sum.
  """

  def kernel(x, scale, *bias, interpret):
    bias = bias[0] if bias else None
    return (_kernels().norm(x, scale, bias, eps, dtype, interpret=interpret),)

  whole = (scale,) if bias is None else (scale, bias)
  y, _ = rows.call(kernel, (x,), whole, sums=0)
  return (y, x) if fork else y


def _kernel_forward(x, scale, bias, eps, dtype, rows, fork):
  return kernel_norm(x, scale, bias, eps, dtype, rows, fork), (x, scale, bias)


def _kernel_backward(eps, dtype, rows, fork, kept, grads):
  del dtype
  x, scale, bias = kept

  def kernel(x, grad, *others, interpret):
    *more, scale = others
    more = more[0] if more else None
    return _kernels().norm_back(x, grad, more, scale, eps, interpret=interpret)

  grads = grads if fork else (grads,)
  out, (of_scale, of_bias) = rows.call(kernel, (x, *grads), (scale,), sums=2)
  return out, of_scale, None if bias is None else of_bias


kernel_norm.defvjp(_kernel_forward, _kernel_backward)
