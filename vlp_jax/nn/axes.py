"""Logical names of array axes, on parameters and on activations.

Parameters: embed, heads, head_dim, mlp, vocab, layers, patch, proj, pos.
Activations: batch, length, act_embed, act_heads, act_mlp. `queue` is a memory's rows.
The mesh axis each stands for is a table in the config (`sharding.rules`).
"""

from collections.abc import Callable
import functools
import math

from flax import errors
import flax.linen as nn
import jax
from jax.experimental import layout
import jax.numpy as jnp

from vlp_jax.ops import pointwise

WIDEST = 8_192  # of what a kernel takes: it holds a row in registers


def boxed(init: Callable, *axes: str | None) -> Callable:
  """An initialiser whose result carries the logical names of its axes."""
  return nn.with_logical_partitioning(init, axes)


def param(
  module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]
) -> jax.Array:
  """`module.param`, for layers of which there are many.

  Flax asks `init` for its shape again in every application, which took a tenth of the
  tracing of a step; of a parameter that is there, the shape says as much.

  Raises:
    flax.errors.ScopeParamShapeError: the parameter that is there has another shape.
  """
  if module.is_initializing() or not module.has_variable("params", name):
    return module.param(name, init, shape)
  value = nn.unbox(module.get_variable("params", name))
  if jnp.shape(value) != tuple(shape):
    raise errors.ScopeParamShapeError(
      name, "/".join(module.path), jnp.shape(value), tuple(shape)
    )
  return value


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Asks the partitioner to shard an activation as its logical axes say."""
  if alone():
    return x
  return jax.lax.with_sharding_constraint(x, nn.logical_to_mesh_axes(axes))


def alone() -> bool:
  """Whether there is one device, and nothing to be spread."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.empty or mesh.size == 1


def platform() -> str:
  """Of the mesh, which may be of devices that are not here: "cpu", "gpu" or "tpu"."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def row_major(x: jax.Array) -> jax.Array:
  """x, and its gradient, laid out in the order of its axes, on a GPU.

  XLA lets a small user of an array decide how it lies: one vector of each image, taken
  out for a product, had all layers of its tower turned over, at a tenth of a step.
  """
  if platform() != "gpu":
    return x
  return layout.with_layout_constraint(x, layout.Layout(tuple(range(x.ndim))))


def mesh_axes(name: str) -> tuple[str, ...]:
  """The mesh axes that a logical axis is split over, here and now; none: it is not."""
  if alone():
    return ()
  (axes,) = nn.logical_to_mesh_axes((name,))
  return (axes,) if isinstance(axes, str) else tuple(axes or ())


def devices_along(name: str) -> int:
  """Over so many devices a logical axis is split, here and now."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[axis] for axis in mesh_axes(name))


def kernel_rows(x: jax.Array, dtype: str, last: str) -> pointwise.Rows | None:
  """How x [B, L, D] is spread where kernels are to work on its rows; None: XLA is.

  They are for GPUs, and for numbers of 16 bits: what is computed in float32 is to be
  compared with other programs digit by digit. last: logical name of the axis D, which
  an activation may be split along and a norm (of "act_embed") may not.
  """
  half = jnp.dtype(dtype).itemsize == 2
  if platform() != "gpu" or not half or x.ndim != 3 or x.shape[-1] > WIDEST:
    return None
  spread = tuple(mesh_axes(name) for name in ("batch", "length", last))
  if last == "act_embed" and spread[-1]:
    return None
  counts = (devices_along(name) for name in ("batch", "length", last))
  if any(size % count for size, count in zip(x.shape, counts, strict=True)):
    return None
  return pointwise.Rows(spread)


def kernel_init(std: float | None, fan_in: int) -> Callable:
  """Truncated normal of deviation `std`, or 1 / sqrt(fan_in) where it is None."""
  std = fan_in**-0.5 if std is None else std

  def init(key, shape, dtype=jnp.float32):
    return _truncated_normal(key, std, tuple(shape), jnp.dtype(dtype))

  return init


# Jitted, so that it is traced once for each shape: Flax asks every parameter's init for
# its shape again whenever a model is applied.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _truncated_normal(key, std, shape, dtype):
  # timm's and BERT's: cut at two deviations (BERT cuts nothing; the tail is 5 %).
  return std * jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)
