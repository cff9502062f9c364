"""Where arrays live: a named mesh, and a table from logical axes to its axes."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
import contextlib
import dataclasses
import logging
import math
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

MESH_AXES = ("data", "fsdp", "tensor")
# Parameters: one of their large axes over fsdp, heads and MLPs over tensor as well.
# Activations: batch over data and fsdp. A queue lies as the batch does.
RULES = {
  "batch": ("data", "fsdp"),
  "queue": ("data", "fsdp"),
  "length": None,
  "act_embed": None,
  "act_heads": "tensor",
  "act_mlp": "tensor",
  "embed": "fsdp",
  "heads": "tensor",
  "head_dim": None,
  "mlp": "tensor",
  "vocab": "tensor",
  "proj": None,
  "patch": None,
  "pos": None,
  "layers": None,
}


@dataclasses.dataclass(frozen=True)
class Sharding:
  """Fields of `config.sharding`.

  Attributes:
    mesh: {"data": …, "fsdp": …, "tensor": …}; one may be -1, which takes the devices
      that are left; those not named are 1. The default puts all on "data".
    rules: {logical axis: mesh axis, tuple of them, or None} over the defaults.
  """

  mesh: dict = dataclasses.field(default_factory=lambda: {"data": -1})
  rules: dict = dataclasses.field(default_factory=dict)

  def table(self) -> tuple[tuple[str, Any], ...]:
    """The rules as flax wants them, defaults filled in.

    Raises:
      ValueError: an unknown logical axis, or a mesh axis that is none.
    """
    for name, target in self.rules.items():
      if name not in RULES:
        raise ValueError(
          f"config: sharding.rules.{name}: no such logical axis; there are"
          f" {', '.join(RULES)}."
        )
      for axis in (target,) if isinstance(target, str) else target or ():
        if axis not in MESH_AXES:
          raise ValueError(
            f"config: sharding.rules.{name}={target!r}: {axis!r} is no axis of the"
            f" mesh; there are {', '.join(MESH_AXES)}."
          )
    return tuple((RULES | dict(self.rules)).items())


def mesh_shape(wanted: dict[str, int], devices: int) -> tuple[int, ...]:
  """Sizes of the mesh axes over so many devices.

  Raises:
    ValueError: an unknown axis, more than one -1, or a product that does not match.
  """
  for axis, size in wanted.items():
    if axis not in MESH_AXES:
      raise ValueError(
        f"config: sharding.mesh.{axis}: no such axis; there are {', '.join(MESH_AXES)}."
      )
    if size != -1 and size < 1:
      raise ValueError(f"config: sharding.mesh.{axis}={size}: want 1 or more, or -1.")
  sizes = [wanted.get(axis, 1) for axis in MESH_AXES]
  said = " x ".join(f"{a}={s}" for a, s in zip(MESH_AXES, sizes, strict=True))
  fixed = math.prod(s for s in sizes if s != -1)
  if sizes.count(-1) > 1:
    raise ValueError(f"config: sharding.mesh: {said}: only one axis may be -1.")
  if -1 in sizes:
    if devices % fixed:
      raise ValueError(
        f"config: sharding.mesh: {said}: {devices} devices do not divide by {fixed}."
      )
    sizes[sizes.index(-1)] = devices // fixed
  elif fixed != devices:
    raise ValueError(
      f"config: sharding.mesh: {said} makes {fixed} devices, but there are {devices}:"
      " set one axis to -1 to take what there is."
    )
  return tuple(sizes)


def make_mesh(
  sharding: Sharding, devices: list[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """The mesh of a run, over all devices unless some are named."""
  devices = jax.devices() if devices is None else devices
  shape = mesh_shape(sharding.mesh, len(devices))
  auto = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
  return jax.make_mesh(shape, MESH_AXES, devices=devices, axis_types=auto)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Whole on every device: what the host reads."""
  return NamedSharding(mesh, PartitionSpec())


def batch_parts(mesh: jax.sharding.Mesh) -> int:
  """Into how many parts a batch is split."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(batch_size: int, mesh: jax.sharding.Mesh) -> None:
  """Raises ValueError if the batch does not split evenly over the mesh."""
  parts = batch_parts(mesh)
  if batch_size % parts:
    low, high = batch_size // parts * parts, -(-batch_size // parts) * parts
    raise ValueError(
      f"config: batch_size={batch_size} is not a multiple of data x fsdp = {parts}:"
      f" choose {low or high} or {high}, or change sharding.mesh."
    )


def use(mesh: jax.sharding.Mesh, sharding: Sharding) -> contextlib.ExitStack:
  """Context in which logical axes mean something: for tracing and running steps."""
  stack = contextlib.ExitStack()
  stack.enter_context(jax.set_mesh(mesh))
  stack.enter_context(nn.logical_axis_rules(sharding.table()))
  return stack


# --- Lanes: parts of "data" that add up their own gradients (see `accumulate`) ---


def lanes(mesh: jax.sharding.Mesh, sharding: Sharding) -> int:
  """How many there may be: as "data" has parts, or 1.

  One where parameters lie over "data", which would have to be whole for every lane, and
  on GPUs: JAX 0.10 cannot `vmap` cuDNN's attention with lengths that are not batched.
  """
  if mesh.devices.flat[0].platform == "gpu":
    return 1
  spread = {n for n, axes in sharding.table() if "data" in _axes(axes)}
  return mesh.shape["data"] if spread <= {"batch", "queue"} else 1


def over_lanes(f: Callable) -> Callable:
  """`jax.vmap(f)` over lanes; in f, no logical axis stands for "data"."""

  def lane(*args):
    table = nn.get_logical_axis_rules()
    inside = [(n, tuple(a for a in _axes(to) if a != "data")) for n, to in table]
    with nn.logical_axis_rules(inside):
      return f(*args)

  return jax.vmap(lane, spmd_axis_name="data")


def apart(arrays: Any) -> Any:
  """Arrays [lanes, …], each lane in its part of "data", and otherwise as they are."""
  if jax.sharding.get_abstract_mesh().empty:
    return arrays  # where shapes alone are asked for
  free = PartitionSpec.UNCONSTRAINED

  def one(x):
    spec = PartitionSpec("data", *[free] * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, spec)

  return jax.tree.map(one, arrays)


def _axes(target):
  """Mesh axes of a row of the table."""
  return (target,) if isinstance(target, str) else tuple(target or ())


def shardings(boxed: Any, mesh: jax.sharding.Mesh, sharding: Sharding) -> Any:
  """A tree of NamedSharding for a tree of (boxed) shapes.

  A dimension that its mesh axes do not divide is replicated, and told of once.
  Leaves without logical names are replicated.
  """
  names = nn.get_partition_spec(boxed)
  shapes = nn.unbox(boxed)
  table = sharding.table()

  def place(spec, shape):
    if not jax.tree.leaves(shape):
      return shape  # The optimiser keeps nothing of a frozen parameter.
    axes = nn.logical_to_mesh_axes(tuple(spec), table) if spec else PartitionSpec()
    kept = []
    for i, axis in enumerate(axes):
      parts = math.prod(
        mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ())
      )
      if shape.shape[i] % parts:
        _tell_once(spec, shape.shape, axis, parts)
        axis = None
      kept.append(axis)
    return NamedSharding(mesh, PartitionSpec(*kept))

  return jax.tree.map(
    place, names, shapes, is_leaf=lambda x: isinstance(x, PartitionSpec)
  )


_TOLD = set()


def _tell_once(spec, shape, axis, parts):
  if (spec, shape, axis) not in _TOLD:
    _TOLD.add((spec, shape, axis))
    logging.getLogger(__name__).info(
      "%s of shape %s stays whole: %s has %d parts.", tuple(spec), shape, axis, parts
    )


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """A batch, split over data and fsdp."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def local_rows(batch_size: int, mesh: jax.sharding.Mesh) -> np.ndarray:
  """int64 [R], ascending: the rows of a batch that this process's devices hold.

  Processes that share a part (a tensor axis between them) both have its rows. Rows need
  not be neighbours: a pod orders its devices by their links, not by their hosts.
  """
  places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  parts = {range(*at[0].indices(batch_size)) for at in places.values()}
  return np.concatenate([np.array(p) for p in sorted(parts, key=lambda p: p.start)])


def put_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """The process's `local_rows` of a batch -> global arrays, over data and fsdp.

  A batch may be {kind of data: batch}.
  """
  split = batch_sharding(mesh)
  parts = split.addressable_devices_indices_map((batch_parts(mesh),))
  here = sorted({at[0].indices(batch_parts(mesh))[0] for at in parts.values()})

  def put(value):
    size = len(value) // len(here)
    shape = (size * batch_parts(mesh), *value.shape[1:])

    def local(at):
      first = here.index(at[0].indices(shape[0])[0] // size) * size
      return value[first : first + size]

    return jax.make_array_from_callback(shape, split, local)

  return jax.tree.map(put, dict(batch))


def prefetch(
  batches: Iterable[dict[str, np.ndarray]], mesh: jax.sharding.Mesh, *, size: int = 2
) -> Iterator[dict[str, Any]]:
  """Batches on the device, of which `size` are there or on their way.

  One is in use; a thread asks for those after it, and puts them on the device: the
  loop need not wait for a reader's turn at Python's lock, nor for a copy. What goes
  wrong with a batch is raised when its turn comes.
  """
  source = iter(batches)

  def get():
    for batch in source:
      return put_batch(batch, mesh)
    return None

  with futures.ThreadPoolExecutor(1, "feeding") as pool:
    ahead = collections.deque(pool.submit(get) for _ in range(size))
    while (batch := ahead.popleft().result()) is not None:
      yield batch
      del batch  # Its memory is free before the next one is asked for.
      ahead.append(pool.submit(get))
