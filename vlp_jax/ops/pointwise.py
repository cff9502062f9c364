"""Activations and layer norm whose backward pass keeps no more than their input.

What is left to automatic differentiation keeps every intermediate array, in float32:
on an accelerator, writing and reading them takes longer than computing them again.

Shape letters: B batch, L length, D width.
"""

from collections.abc import Callable
import functools
import math

import jax
import jax.numpy as jnp

Pointwise = Callable[[jax.Array], jax.Array]


def keeping_input(forward: Pointwise) -> Pointwise:
  """`forward`, of one float array, computed in float32, whose input alone is kept."""

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
  return call


# Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415: x times the normal
# distribution's cumulative function; `tanh` is their approximation. By erf, as torch
# has it: erfc, which jax.nn.gelu takes, is three times the work.
gelu = keeping_input(lambda x: 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5))))
gelu_tanh = keeping_input(lambda x: jax.nn.gelu(x, approximate=True))
# OpenAI CLIP, model.py QuickGELU.
quick_gelu = keeping_input(lambda x: x * jax.nn.sigmoid(1.702 * x))
silu = keeping_input(jax.nn.silu)


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
