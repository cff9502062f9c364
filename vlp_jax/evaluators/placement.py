"""Runs compiled functions over host batches, on the mesh."""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import dataclasses
import math
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

# Mesh axes that split a batch.
BATCH_AXES = ("data", "fsdp")
# Called whenever an evaluation has got a batch, or a result.
_told: list[Callable[[], None]] = []


@contextlib.contextmanager
def telling(each: Callable[[], None]) -> Iterator[None]:
  """While it lasts, `Placement.run` calls this for every batch, and every result."""
  _told.append(each)
  try:
    yield
  finally:
    _told.remove(each)


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where the batches of an evaluation go.

  Every process holds the whole host batch and gives its devices their part; results
  come back whole on every process.

  Attributes:
    mesh: with axes among `data`, `fsdp` and `tensor`; None: the default device.
  """

  mesh: jax.sharding.Mesh | None

  @property
  def parts(self) -> int:
    """Into how many parts a batch is split."""
    return 1 if self.mesh is None else math.prod(self.mesh.shape[a] for a in self._axes)

  @property
  def _axes(self):
    return tuple(a for a in BATCH_AXES if a in self.mesh.shape)

  def split(self, tree: Any) -> Any:
    """Host arrays -> device arrays, the first axis split over the mesh."""
    return self._put(tree, () if self.mesh is None else (self._axes,))

  def copy(self, tree: Any) -> Any:
    """Host arrays -> device arrays, whole on every device."""
    return self._put(tree, ())

  def _put(self, tree, spec):
    if self.mesh is None:
      return jax.device_put(tree)
    sharding = NamedSharding(self.mesh, PartitionSpec(*spec))
    # Unlike device_put, this needs only the process's own part to be addressable.
    return jax.tree.map(
      lambda x: jax.make_array_from_callback(x.shape, sharding, lambda at: x[at]), tree
    )

  def jit(self, fn: Callable) -> Callable:
    """`jax.jit` whose result is whole on every device."""
    if self.mesh is None:
      return jax.jit(fn)
    return jax.jit(fn, out_shardings=NamedSharding(self.mesh, PartitionSpec()))

  def run(
    self, fn: Callable, variables: Any, batches: Iterable[tuple[Any, tuple]]
  ) -> Iterator[tuple[Any, Any]]:
    """Yields (note, `fn(variables, *args)` on the host) for each (note, args).

    `args` are on the device. One call is always in flight while the host prepares the
    next batch.
    """
    waiting = []
    for note, args in batches:
      _tell()
      waiting.append((note, fn(variables, *args)))
      if len(waiting) > 1:
        yield _got(*waiting.pop(0))
    for note, result in waiting:
      yield _got(note, result)


def _got(note, result):
  result = jax.device_get(result)
  _tell()
  return note, result


def _tell():
  for each in _told:
    each()


def of(mesh: jax.sharding.Mesh | None, batch_size: int) -> Placement:
  """Where batches of this size go.

  Raises:
    ValueError: they do not split evenly.
  """
  place = Placement(mesh)
  if batch_size < 1 or batch_size % place.parts:
    raise ValueError(
      f"evals: batch_size={batch_size} is not a multiple of the {place.parts} parts of"
      f" the mesh's axes {'·'.join(BATCH_AXES)}: choose one that is."
    )
  return place


def pad(tree: Any, rows: int) -> Any:
  """Host arrays with the first row repeated at the end until there are `rows`."""

  def padded(x):
    return np.concatenate([x, np.repeat(x[:1], rows - len(x), axis=0)])

  return jax.tree.map(padded, tree)


def join(trees: list[Any]) -> Any:
  """Concatenates the leaves of trees of host arrays on the first axis."""
  return jax.tree.map(lambda *xs: np.concatenate(xs), *trees)


def take(tree: Any, rows: np.ndarray | slice) -> Any:
  """The given rows of every host array."""
  return jax.tree.map(lambda x: x[rows], tree)


def batches(columns: dict[str, np.ndarray], batch_size: int) -> Iterator[dict]:
  """Batches of host arrays, the last one padded, with `valid` bool [B]."""
  count = len(next(iter(columns.values())))
  for start in range(0, count, batch_size):
    part = take(columns, slice(start, start + batch_size))
    valid = np.arange(batch_size) < count - start
    yield pad(part, batch_size) | {"valid": valid}
