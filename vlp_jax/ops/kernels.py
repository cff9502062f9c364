"""Triton kernels of a GPU, written in Pallas: rows are read once and written once.

What XLA makes of a layer norm whose backward pass wants sums over rows reads an array
three times and more; what it makes of an activation's backward pass with the sum for a
bias runs at half of the memory's rate (README, "Benchmarks").

Shape letters: R rows, D width, C columns of a program.
"""

from collections.abc import Callable
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
import jax.numpy as jnp

# So many programs share the rows where each keeps sums over them: several for each
# multiprocessor, so that one computes while another waits for memory. Of an H200's
# choice: 8 and 16 for each of its 132.
OF_NORM = 1_056
OF_ACTIVATION = 2_112


def norm(
  x: jax.Array,
  scale: jax.Array,
  bias: jax.Array | None,
  eps: float,
  dtype: str,
  *,
  interpret: bool = False,
) -> jax.Array:
  """Layer norm of x [R, D] in float32, variance by two passes: [R, D] of `dtype`.

  scale, bias float32 [D]. interpret: by JAX, on any device.
  """
  rows, width = x.shape
  lanes = pl.next_power_of_2(width)
  block = max(1, 4_096 // lanes)
  return pl.pallas_call(
    functools.partial(_norm, rows=rows, width=width, block=block, eps=eps),
    grid=(pl.cdiv(rows, block),),
    out_shape=jax.ShapeDtypeStruct(x.shape, dtype),
    compiler_params=_warps(block * lanes // 1_024),
    interpret=interpret,
    name="layer_norm",
  )(x, scale, jnp.zeros_like(scale) if bias is None else bias)


def norm_back(
  x: jax.Array,
  grad: jax.Array,
  more: jax.Array | None,
  scale: jax.Array,
  eps: float,
  *,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of `norm`: of x [R, D], with `more` added to it, and of scale and bias.

  grad, more [R, D] of any float type. The last two are float32 [D].
  """
  rows, width = x.shape
  lanes = pl.next_power_of_2(width)
  block = max(1, 2_048 // lanes)
  turns = pl.cdiv(rows, OF_NORM * block)
  programs = pl.cdiv(rows, turns * block)
  sums = jax.ShapeDtypeStruct((programs, width), jnp.float32)
  arrays = (x, grad, scale) if more is None else (x, grad, scale, more)
  out, of_scale, of_bias = pl.pallas_call(
    functools.partial(
      _norm_back, rows=rows, width=width, block=block, turns=turns, eps=eps
    ),
    grid=(programs,),
    out_shape=(jax.ShapeDtypeStruct(x.shape, x.dtype), sums, sums),
    compiler_params=_warps(block * lanes // 512),
    interpret=interpret,
    name="layer_norm_back",
  )(*arrays)
  return out, of_scale.sum(axis=0), of_bias.sum(axis=0)


def activation_back(
  slope: Callable[[jax.Array], jax.Array],
  x: jax.Array,
  bias: jax.Array,
  grad: jax.Array,
  *,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Gradients of f(x + bias): of x [R, D], in its type, and of bias float32 [D].

  slope: the derivative of f, a function of each number by itself, in float32.
  """
  rows, width = x.shape
  block, columns = 4, min(1_024, pl.next_power_of_2(width))
  across = pl.cdiv(width, columns)
  turns = pl.cdiv(rows * across, OF_ACTIVATION * block)
  programs = pl.cdiv(rows, turns * block)
  out, of_bias = pl.pallas_call(
    functools.partial(
      _activation_back,
      slope=slope,
      rows=rows,
      width=width,
      block=block,
      columns=columns,
      turns=turns,
    ),
    grid=(programs, across),
    out_shape=(
      jax.ShapeDtypeStruct(x.shape, x.dtype),
      jax.ShapeDtypeStruct((programs, width), jnp.float32),
    ),
    compiler_params=_warps(4),
    interpret=interpret,
    name="activation_back",
  )(x, bias, grad)
  return out, of_bias.sum(axis=0)


def _warps(count):
  return triton.CompilerParams(num_warps=max(4, count), num_stages=1)


def _at(ref, rows, columns, here, inside):
  """Loads a block as float32, zero where it is not."""
  at = ref.at[rows[:, None], columns[None, :]]
  ok = here[:, None] & inside[None, :]
  return triton.load(at, mask=ok, other=0.0).astype(jnp.float32)


def _put(ref, rows, columns, here, inside, value):
  at = ref.at[rows[:, None], columns[None, :]]
  triton.store(at, value.astype(ref.dtype), mask=here[:, None] & inside[None, :])


def _unit(x, inside, width, eps):
  """(x - mean) / deviation of each row, and one over the deviation [., 1]."""
  mean = jnp.sum(x, axis=1, keepdims=True) / width
  x = jnp.where(inside[None, :], x - mean, 0.0)
  inverse = jax.lax.rsqrt(jnp.sum(x * x, axis=1, keepdims=True) / width + eps)
  return x * inverse, inverse


def _norm(x_ref, scale_ref, bias_ref, out_ref, *, rows, width, block, eps):
  r = pl.program_id(0) * block + jnp.arange(block)
  c = jnp.arange(pl.next_power_of_2(width))
  here, inside = r < rows, c < width
  unit, _ = _unit(_at(x_ref, r, c, here, inside), inside, width, eps)
  scale = triton.load(scale_ref.at[c], mask=inside, other=0.0)
  bias = triton.load(bias_ref.at[c], mask=inside, other=0.0)
  _put(out_ref, r, c, here, inside, unit * scale[None, :] + bias[None, :])


def _norm_back(x_ref, grad_ref, scale_ref, *refs, rows, width, block, turns, eps):
  more_ref = refs[0] if len(refs) == 4 else None
  out_ref, of_scale_ref, of_bias_ref = refs[-3:]
  program = pl.program_id(0)
  c = jnp.arange(pl.next_power_of_2(width))
  inside = c < width
  scale = triton.load(scale_ref.at[c], mask=inside, other=0.0)[None, :]

  def turn(i, sums):
    r = (program * turns + i) * block + jnp.arange(block)
    here = r < rows
    unit, inverse = _unit(_at(x_ref, r, c, here, inside), inside, width, eps)
    grad = _at(grad_ref, r, c, here, inside)
    inner = grad * scale
    along = jnp.sum(inner * unit, axis=1, keepdims=True) / width
    level = jnp.sum(inner, axis=1, keepdims=True) / width
    out = inverse * (inner - level - unit * along)
    if more_ref is not None:
      out = out + _at(more_ref, r, c, here, inside)
    _put(out_ref, r, c, here, inside, out)
    of_scale, of_bias = sums
    return of_scale + jnp.sum(grad * unit, axis=0), of_bias + jnp.sum(grad, axis=0)

  zero = jnp.zeros(c.shape, jnp.float32)
  of_scale, of_bias = jax.lax.fori_loop(0, turns, turn, (zero, zero))
  triton.store(of_scale_ref.at[program, c], of_scale, mask=inside)
  triton.store(of_bias_ref.at[program, c], of_bias, mask=inside)


def _activation_back(
  x_ref,
  bias_ref,
  grad_ref,
  out_ref,
  of_bias_ref,
  *,
  slope,
  rows,
  width,
  block,
  columns,
  turns,
):
  program = pl.program_id(0)
  c = pl.program_id(1) * columns + jnp.arange(columns)
  inside = c < width
  bias = triton.load(bias_ref.at[c], mask=inside, other=0.0).astype(jnp.float32)

  def turn(i, total):
    r = (program * turns + i) * block + jnp.arange(block)
    here = r < rows
    x = _at(x_ref, r, c, here, inside) + bias[None, :]
    out = slope(x) * _at(grad_ref, r, c, here, inside)
    _put(out_ref, r, c, here, inside, out)
    return total + jnp.sum(out, axis=0)

  total = jax.lax.fori_loop(0, turns, turn, jnp.zeros((columns,), jnp.float32))
  triton.store(of_bias_ref.at[program, c], total, mask=inside)
