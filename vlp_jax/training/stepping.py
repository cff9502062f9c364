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
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from vlp_jax.training import accumulate
from vlp_jax.training import course
from vlp_jax.training import sharding as sharding_lib
from vlp_jax.training import step as step_lib


@dataclasses.dataclass(frozen=True)
class Program:
  """A part of a step that is compiled as one.

  Attributes:
    name: of the stage. fn: jitted; `fn.lower(*args)` inside of `sharding.use(…)`.
    args: ShapeDtypeStructs with shardings. times: it runs so often in a step.
  """

  name: str
  fn: Any
  args: tuple[Any, ...]
  times: int = 1


@contextlib.contextmanager
def compiling(
  programs: Sequence[Program], mesh: jax.sharding.Mesh, sharding: sharding_lib.Sharding
) -> Iterator[futures.Future]:
  """Compiles programs while other things are done; at the end all are.

  JAX finds them again when they are called. Yields what is done when all are traced:
  until then, Python in another thread would be in the way of that.
  """

  def lowered():
    # Mesh and rules are known to the thread that set them.
    with sharding_lib.use(mesh, sharding):
      return [program.fn.lower(*program.args) for program in programs]

  def compiled():
    for program in traced.result():
      program.compile()

  with futures.ThreadPoolExecutor(1, "compiling") as pool:
    traced = pool.submit(lowered)
    done = pool.submit(compiled)
    yield traced
    done.result()


class Whole:
  """A step as one program; calling it is `(state, batch) -> (state, metrics)`.

  A call returns when the step before it is done: the device has one step to go on with,
  and the host no more than that ahead. JAX would let it run ahead by dozens of steps,
  each with a batch that takes the device's memory.
  """

  def __init__(
    self,
    step: Callable,
    state: step_lib.TrainState,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    mesh: jax.sharding.Mesh,
  ):
    """Args: the step; abstract state; shapes of a batch; the mesh."""
    out = (jax.tree.map(lambda x: x.sharding, state), sharding_lib.replicated(mesh))
    self._mesh = mesh
    self._before = None  # metrics of the last step that was begun
    self._step = jax.jit(step, donate_argnums=0, out_shardings=out)
    self.programs = [Program("step", self._step, (state, _placed(batch, mesh)))]

  def feed(self, batches: Iterable[Mapping[str, np.ndarray]]) -> Iterator[Any]:
    """What to call it with, of batches of the host."""
    return sharding_lib.prefetch(batches, self._mesh)

  def __call__(self, state: step_lib.TrainState, batch: Any) -> tuple[Any, Any]:
    state, metrics = self._step(state, batch)
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
    """Args: as of `Whole`."""
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

    one = functools.partial(jax.jit, donate_argnums=0, out_shardings=places)
    self._begin = one(stages.begin)
    embedded_places = jax.tree.map(lambda x: x.sharding, embedded)
    self._embed = jax.jit(stages.embed, donate_argnums=3, out_shardings=embedded_places)
    self._across = jax.jit(
      stages.across, out_shardings=(across_places, gradient_places)
    )
    self._backward = jax.jit(
      backward, donate_argnums=(4, 5), out_shardings=(gradient_places, told_places)
    )
    # The gradients have no result to give their memory to.
    self._apply = jax.jit(stages.apply, donate_argnums=0, out_shardings=(places, whole))
    self._zeros = jax.jit(
      lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (embedded, told)),
      out_shardings=(embedded_places, told_places),
    )
    self._teaches = state.ema is not None
    count = layout.count
    begin = [Program("begin", self._begin, (state,))] if self._teaches else []
    backward_args = (state, rows, number, across, gradients, told)
    self.programs = [
      *begin,
      Program("embed", self._embed, (state, rows, number, embedded), count),
      Program("across", self._across, (state, reads, embedded)),
      Program("backward", self._backward, backward_args, count),
      Program("apply", self._apply, (state, across, gradients, told)),
    ]

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
