"""Rows of a batch that is split over devices, taken by other rows of it.

Of `x[rows]` XLA makes a gather of the whole x on every device; of its gradient, another
gather of the whole and a sum of it over all devices. Here a device hears only of those
that hold rows which it may need: once, and of their gradients once.

Shape letters: B batch, b rows of a device, G rows of those that hear of each other.
"""

from collections.abc import Sequence
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np


def take(
  tree: Any, rows_B: jax.Array, *, group: int | None = None, axes: Sequence[str] = ()
) -> Any:
  """`x[rows_B]` of every array [B, …] of a tree, the same numbers on any mesh.

  Args:
    rows_B: int32, which row each row takes.
    group: a row takes from its own run of so many rows alone, the first of which begins
      at row 0 (not checked: another row may then be taken); None: from the whole batch.
    axes: of the mesh (`jax.set_mesh`) over which B is split; none: it is not.
  """
  batch, axes = rows_B.shape[0], tuple(axes)
  shape = jax.sharding.get_abstract_mesh().shape
  devices = math.prod(shape[axis] for axis in axes)
  if devices == 1 or batch % devices:
    return jax.tree.map(lambda x: x[rows_B], tree)
  near = neighbours(batch, group or batch, devices)

  def here(tree, rows):
    # What these devices have begins at a multiple of its own length.
    at = rows % (near * rows.shape[0])
    if near == 1:
      return jax.tree.map(lambda x: x[at], tree)
    return jax.tree.map(lambda x: _take_among(axes, near, x, at), tree)

  split = PartitionSpec(axes)
  return jax.shard_map(here, in_specs=split, out_specs=split)(tree, rows_B)


def neighbours(batch: int, group: int, devices: int) -> int:
  """Runs of so many devices, a divisor of all, hold whole groups among themselves.

  batch: a multiple of `devices`, over which it is split.
  """
  own = batch // devices
  near = math.lcm(group, own) // own
  return devices if devices % near else near


def _take_among(axes, near, x, at):
  """Rows `at` [b] of the x [G, …] that runs of `near` devices have together."""
  if not jnp.issubdtype(x.dtype, jnp.inexact):
    return _all(axes, near, x)[at]
  return _differentiable(axes, near, x, at)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(axes, near, x, at):
  return _all(axes, near, x)[at]


def _forward(axes, near, x, at):
  return _differentiable(axes, near, x, at), at


def _backward(axes, near, at, slope):
  """Every device picks what belongs to its rows.

  The transpose would be a scatter and a reduce-scatter, which the TPU's compiler turns
  into a sum of the whole on every device (METER on v5e:16x16, by `vlp-jax plan`: 154 ms
  a step, this way 144). It is added up in float32.
  """
  own = slope.shape[0]
  first = jax.lax.axis_index(axes) % near * own
  mine = jax.nn.one_hot(_all(axes, near, at) - first, own, axis=0, dtype=slope.dtype)
  gradient = jnp.einsum(
    "bG,G...->b...",
    mine,
    _all(axes, near, slope),
    precision="highest",
    preferred_element_type=jnp.float32,
  )
  return gradient.astype(slope.dtype), None


_differentiable.defvjp(_forward, _backward)


def _all(axes, near, x):
  """[G, …] of [b, …]."""
  runs = np.arange(jax.lax.axis_size(axes)).reshape(-1, near).tolist()
  return jax.lax.all_gather(x, axes, axis_index_groups=runs, tiled=True)
