"""Rows of a batch that is split over devices, taken by other rows of it.

Of `x[rows]` XLA makes a gather of the whole x on every device; of its gradient, another
gather of the whole and a sum of it over all devices. Here a device hears of the rows
that it may need alone, and the gradient is one reduce-scatter among the same devices.

Shape letters: B batch, G group, b rows of a device, N rows that are taken by each.
"""

from collections.abc import Sequence
import math
from typing import Any

import jax
from jax.sharding import PartitionSpec


def take(
  tree: Any, rows: jax.Array, *, group: int | None = None, axes: Sequence[str] = ()
) -> Any:
  """`x[rows]` of every array [B, …] of a tree, the same numbers on any mesh.

  Args:
    rows: int32 [B, N] or [B]: which rows each row takes.
    group: a row takes from its own run of so many rows alone, those from 0 on being the
      first (not checked: another row may then be taken); None: from the whole batch.
    axes: of the mesh (`jax.set_mesh`) over which B is split; none: it is not.

  Returns:
    Arrays [B, N, …] or [B, …], split as they were.
  """
  batch, axes = rows.shape[0], tuple(axes)
  shape = jax.sharding.get_abstract_mesh().shape
  devices = math.prod(shape[axis] for axis in axes)
  if devices == 1 or batch % devices:
    return jax.tree.map(lambda x: x[rows], tree)
  near = neighbours(batch, group or batch, devices)

  def here(tree, rows):
    if near > 1:
      starts = range(0, devices, near)
      runs = [list(range(start, start + near)) for start in starts]
      tree = jax.tree.map(
        lambda x: jax.lax.all_gather(x, axes, axis_index_groups=runs, tiled=True), tree
      )
    # What is here begins with a multiple of its own length.
    at = rows % (near * (batch // devices))
    return jax.tree.map(lambda x: x[at], tree)

  split = PartitionSpec(axes)
  return jax.shard_map(here, in_specs=split, out_specs=split)(tree, rows)


def neighbours(batch: int, group: int, devices: int) -> int:
  """Runs of so many devices, a divisor of all, hold whole groups among themselves.

  batch: a multiple of `devices`, over which it is split.
  """
  own = batch // devices
  near = math.lcm(group, own) // own
  return devices if devices % near else near
