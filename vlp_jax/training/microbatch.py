"""Which rows of a batch are a microbatch, and which of those are a lane.

A microbatch is L lanes side by side, each of the rows that lie in one part of the mesh
axis "data", so that no lane needs anything of another.

Shape letters: B global batch, b = B / M rows of a microbatch, M microbatches, P parts,
L lanes.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from vlp_jax.training import sharding as sharding_lib


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a global batch is cut.

  Each of P runs of B / P neighbouring rows gives b / P neighbours to every microbatch:
  where P is the number of the mesh's parts, no row leaves its device.

  Attributes:
    batch_size: B. count: M. parts: P. lanes: L, a divisor of P.
  """

  batch_size: int
  count: int = 1
  parts: int = 1
  lanes: int = 1

  @property
  def rows(self) -> int:
    return self.batch_size // self.count

  def take(self, whole: Any, number: jax.Array) -> Any:
    """Rows of microbatch `number`: a tree of [b, …] out of [B, …]."""

    def one(x):
      x = self._cut(x)
      x = jax.lax.dynamic_index_in_dim(x, number, axis=1, keepdims=False)
      return x.reshape(self.rows, *x.shape[2:])

    return jax.tree.map(one, whole)

  def put(self, whole: Any, rows: Any, number: jax.Array) -> Any:
    """`whole` [B, …] with `rows` [b, …] as its microbatch `number`."""

    def one(x, new):
      new = new.reshape(self.parts, -1, *new.shape[1:])
      cut = jax.lax.dynamic_update_index_in_dim(self._cut(x), new, number, axis=1)
      return cut.reshape(x.shape)

    return jax.tree.map(one, whole, rows)

  def side_by_side(self, f: Callable, number: jax.Array, *rows: Any) -> Any:
    """[L, …] of `f(own number, *rows)` of each lane, for trees of [b, …].

    f: of a number that no other lane of a step has, and of [b / L, …].
    """
    if self.lanes == 1:
      return jax.tree.map(lambda x: x[None], f(number, *rows))
    lanes = jnp.arange(self.lanes, dtype=jnp.int32)
    cut = lambda x: x.reshape(self.lanes, -1, *x.shape[1:])
    over = sharding_lib.over_lanes(f)
    return over(number * self.lanes + lanes, *jax.tree.map(cut, rows))

  def begin(self, gradient: Any) -> Any:
    """[L, …] gradients whose sum is this one."""

    def one(x):
      lanes = jnp.arange(self.lanes).reshape(-1, *[1] * x.ndim)
      return jnp.where(lanes == 0, x, 0)

    return self.apart(jax.tree.map(one, gradient))

  def apart(self, gradients: Any) -> Any:
    """The same [L, …], each lane's where its rows are."""
    return sharding_lib.apart(gradients) if self.lanes > 1 else gradients

  def _cut(self, x):
    return x.reshape(self.parts, self.count, -1, *x.shape[1:])


def layout(
  objectives: Mapping[str, Any],
  *,
  batch_size: int,
  count: int,
  parts: int,
  lanes: int = 1,
) -> Layout:
  """How to cut the batch of these objectives on a mesh that splits it into `parts`.

  Args:
    lanes: as `sharding.lanes` has them; 1 where neighbours would be parted.

  Raises:
    ValueError: it does not divide, or an objective cannot be had by microbatches; names
      the field and the way out.
  """
  if count == 1:
    return Layout(batch_size)
  if batch_size % count or batch_size // count % parts:
    least = parts * count
    raise ValueError(
      f"config: accumulate={count}: batch_size={batch_size} does not make so many"
      f" microbatches that split over data x fsdp = {parts}: choose batch_size a"
      f" multiple of {least}, or another accumulate."
    )
  rows = batch_size // count
  wont = [n for n, o in objectives.items() if not getattr(o, "accumulates", None)]
  if wont:
    raise ValueError(
      f"config: accumulate={count}: objectives.{wont[0]} does not say how it is had by"
      f" microbatches (`accumulates`, see vlp_jax/pretrainer.py): set accumulate=1, or"
      f" objectives.{wont[0]}=None."
    )
  by_rows = [o for o in objectives.values() if o.accumulates == "rows"]
  together = math.lcm(1, *(objective.together(rows) for objective in by_rows))
  # As many runs as the mesh has parts, or fewer where neighbours would be parted: their
  # rows then move between devices, once a step.
  fits = [p for p in range(1, parts + 1) if not parts % p and not rows // p % together]
  if not fits:
    raise ValueError(
      f"config: accumulate={count}: {together} neighbours have to stay together, which"
      f" does not divide the {rows} rows of a microbatch."
    )
  runs = max(fits)
  return Layout(batch_size, count, runs, 1 if runs % lanes else lanes)
