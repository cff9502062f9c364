"""The programs that a train step consists of, compiled, and how they are run.

`Whole`: one program, over a batch that is on the devices. `Streamed`: one for each
stage of accumulation, in a loop of the host, which hands the devices one microbatch
after the other; they hold the state, the embeddings and two gradients: of the
parameters, and of the embeddings.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from vlp_jax.training import accumulate
from vlp_jax.training import ahead
from vlp_jax.training import course
from vlp_jax.training import sharding as sharding_lib
from vlp_jax.training import step as step_lib
from vlp_jax.training.program import Program


@contextlib.contextmanager
def compiling(
  programs: Sequence[Program],
  mesh: jax.sharding.Mesh,
  sharding: sharding_lib.Sharding,
  start: ahead.Programs = ahead.NOTHING,
) -> Iterator[futures.Future]:
  """Compiles programs while other things are done; at the end all are.

  Yields what is done when all are traced that the `start` does not know: until then,
  Python in another thread would be in the way of that.
  """

  def lowered():
    # Mesh and rules are known to the thread that set them.
    with sharding_lib.use(mesh, sharding):
      return [None if start.knows(p) else start.lower(p) for p in programs]

  def compiled():
    for program, own in zip(programs, traced.result(), strict=True):
      with sharding_lib.use(mesh, sharding):
        start.ready(program, own)

  with futures.ThreadPoolExecutor(1, "compiling") as pool:
    traced = pool.submit(lowered)
    done = pool.submit(compiled)
    yield traced
    done.result()


@dataclasses.dataclass(frozen=True)
class Reading:
  """What some of a run's steps read.

  Attributes:
    kinds: of data, with "+" between; "": there is one kind.
    share: of all steps.
    batch: ShapeDtypeStructs of a batch; of several kinds, {kind: those}.
  """

  kinds: str
  share: float
  batch: Mapping[str, Any]


class Whole:
  """A step as one program; calling it is `(state, batch) -> (state, metrics)`.

  Of several kinds of data there is one program for what each step reads of them.

  A call returns when the step before it is done: the device has one step to go on with,
  and the host no more than that ahead. JAX would let it run ahead by dozens of steps,
  each with a batch that takes the device's memory.
  """

  def __init__(
    self,
    step: Callable,
    state: step_lib.TrainState,
    readings: Sequence[Reading],
    mesh: jax.sharding.Mesh,
  ):
    """Args: the step; abstract state; what steps read; the mesh."""
    out = (jax.tree.map(lambda x: x.sharding, state), sharding_lib.replicated(mesh))
    self._mesh = mesh
    self._before = None  # metrics of the last step that was begun
    jitted = jax.jit(step, donate_argnums=0, out_shardings=out)
    self._programs = {
      _structure(reading.batch): Program(
        f"step {reading.kinds}".strip(),
        jitted,
        (state, _placed(reading.batch, mesh)),
        reading.share,
      )
      for reading in readings
    }
    self.programs = list(self._programs.values())

  def feed(self, batches: Iterable[Mapping[str, np.ndarray]]) -> Iterator[Any]:
    """What to call it with, of batches of the host."""
    return sharding_lib.prefetch(batches, self._mesh)

  def __call__(self, state: step_lib.TrainState, batch: Any) -> tuple[Any, Any]:
    state, metrics = self._programs[_structure(batch)](state, batch)
    jax.block_until_ready(self._before)
    self._before = metrics
    return state, metrics


class Streamed:
  """A step as one program a stage; called with the pieces of a batch, on the host.

  A step may take half an hour: with each piece this process goes on in its course. On
  the devices are the piece in use and the next one, which comes meanwhile.
  """

  def __init__(
    self,
    stages: accumulate.Stages,
    state: step_lib.TrainState,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    mesh: jax.sharding.Mesh,
  ):
    """Args: as of `Whole`; the shapes of its batch."""
    layout = stages.layout
    self._stages, self._layout, self._mesh = stages, layout, mesh
    split, whole = _split(mesh), sharding_lib.replicated(mesh)
    places = jax.tree.map(lambda x: x.sharding, state)
    rows = {k: _resized(v, layout.rows) for k, v in batch.items()}
    rows = _placed(rows, mesh)
    reads = _placed({key: batch[key] for key in stages.reads}, mesh)
    number = jax.ShapeDtypeStruct((), np.int32)
    embedded = _placed(stages.empty(state, rows), mesh)
    across, gradients = jax.eval_shape(stages.across, state, reads, embedded)
    across_places = jax.tree.map(lambda _: whole, across)
    across_places = dataclasses.replace(
      across_places,
      gradient=jax.tree.map(lambda _: split, across.gradient),
      drawn=jax.tree.map(lambda _: split, across.drawn),
      memory=places.memory,
    )
    told = stages.told(state, rows, across, gradients)
    told_places = jax.tree.map(lambda _: whole, told)
    across, told = _at(across, across_places), _at(told, told_places)
    lanes = "data" if layout.lanes > 1 else None
    gradient_places = jax.tree.map(
      lambda x: NamedSharding(mesh, PartitionSpec(lanes, *x.spec)), places.params
    )
    gradients = _at(gradients, gradient_places)

    def backward(state, rows, number, across, gradients, told):
      gradients, more = stages.backward(state, rows, number, across, gradients)
      return gradients, jax.tree.map(jnp.add, told, more)

    embedded_places = jax.tree.map(lambda x: x.sharding, embedded)
    count = layout.count
    self._begin = Program(
      "begin", jax.jit(stages.begin, donate_argnums=0, out_shardings=places), (state,)
    )
    self._embed = Program(
      "embed",
      jax.jit(stages.embed, donate_argnums=3, out_shardings=embedded_places),
      (state, rows, number, embedded),
      count,
    )
    self._across = Program(
      "across",
      jax.jit(stages.across, out_shardings=(across_places, gradient_places)),
      (state, reads, embedded),
    )
    into = (gradient_places, told_places)
    self._backward = Program(
      "backward",
      jax.jit(backward, donate_argnums=(4, 5), out_shardings=into),
      (state, rows, number, across, gradients, told),
      count,
    )
    # The gradients have no result to give their memory to.
    self._apply = Program(
      "apply",
      jax.jit(stages.apply, donate_argnums=0, out_shardings=(places, whole)),
      (state, across, gradients, told),
    )
    self._zeros = jax.jit(
      lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (embedded, told)),
      out_shardings=(embedded_places, told_places),
    )
    self._teaches = state.ema is not None
    begin = [self._begin] if self._teaches else []
    stages_of = [self._embed, self._across, self._backward, self._apply]
    self.programs = [*begin, *stages_of]

  def feed(self, pieces: Iterable[Mapping[str, np.ndarray]]) -> Iterator[Any]:
    """What to call it with: the pieces of each batch, which stay on the host."""
    together = []
    for piece in pieces:
      together.append(piece)
      course.go_on()
      if len(together) == self._layout.count:
        yield together
        together = []

  def __call__(
    self, state: step_lib.TrainState, pieces: list[Mapping[str, np.ndarray]]
  ) -> tuple[Any, Any]:
    if self._teaches:
      state = self._begin(state)
    embedded, told = self._zeros()
    for number, rows in enumerate(sharding_lib.prefetch(pieces, self._mesh)):
      embedded = self._embed(state, rows, np.int32(number), embedded)
      jax.block_until_ready(embedded)
      course.go_on()
    reads = {k: self._whole([p[k] for p in pieces]) for k in self._stages.reads}
    reads = sharding_lib.put_batch(reads, self._mesh)
    across, gradients = self._across(state, reads, embedded)
    del embedded
    for number, rows in enumerate(sharding_lib.prefetch(pieces, self._mesh)):
      given = (state, rows, np.int32(number), across, gradients, told)
      gradients, told = self._backward(*given)
      jax.block_until_ready(told)
      course.go_on()
    return self._apply(state, across, gradients, told)

  def _whole(self, pieces):
    """This process's rows of a column, in the order of the batch."""
    runs = len(pieces[0]) * self._layout.parts // self._layout.rows
    cut = [x.reshape(runs, -1, *x.shape[1:]) for x in pieces]
    return np.stack(cut, axis=1).reshape(-1, *pieces[0].shape[1:])


def _structure(batch):
  """Kinds of data, or columns of the one there is."""
  return frozenset(batch)


def _split(mesh):
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def _resized(x, rows):
  return jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)


def _placed(shapes, mesh):
  """Shapes of arrays that lie as a batch does."""
  return _at(shapes, jax.tree.map(lambda _: _split(mesh), shapes))


def _at(shapes, places):
  make = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
  return jax.tree.map(make, shapes, places)
