"""The state of a run and the pure function that takes it one step further."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from vlp_jax.ops import prng
from vlp_jax.ops import reduce
from vlp_jax.ops import tree
from vlp_jax.training import draw as draw_lib
from vlp_jax.training import guard as guard_lib
from vlp_jax.training import sharding as sharding_lib
from vlp_jax.training.program import Program

# The order is part of what a seed means: add at the end.
STREAMS = ("dropout", "mask", "sample", "draw")


@flax.struct.dataclass
class TrainState:
  """All that a checkpoint holds; nothing in it is random.

  step int32 []; params; opt_state; ema: like params, or None without a teacher;
  memory: the state that is no parameter: queues of objectives, running statistics of
    the model's batch norm. guard: what steps are compared with.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  ema: Any
  memory: Any
  guard: guard_lib.Record = dataclasses.field(default_factory=guard_lib.fresh)

  def variables(self) -> dict[str, Any]:
    """What inference reads: parameters, and what the model's own layers keep.

    The memory of objectives (queues) is of training alone.
    """
    kept = self.memory.get("model")
    return {"params": self.params} | ({"memory": {"model": kept}} if kept else {})


def keys(seed: int, step: jax.Array) -> dict[str, jax.Array]:
  """The PRNG key of each stream: a function of (seed, step, stream)."""
  key = jax.random.fold_in(jax.random.key(seed), step)
  return {name: jax.random.fold_in(key, i) for i, name in enumerate(STREAMS)}


class _ById:
  """A module as a key: a module that holds a dict has no hash."""

  def __init__(self, module):
    self.module = module

  def __eq__(self, other):
    return self.module is other.module

  def __hash__(self):
    return id(self.module)


@functools.lru_cache(maxsize=4)
def _variables(by_id):
  """`(key, batch) -> variables` of `by_id.module`, boxed.

  Jitted, and the same function whenever it is asked for, so that JAX goes through the
  model once for its shapes, their places and their values.
  """

  @jax.jit
  def variables(key, batch):
    rngs = {name: jax.random.fold_in(key, i) for i, name in enumerate(STREAMS)}
    return by_id.module.init({"params": key, **rngs}, batch)

  return variables


def make_init(
  pretrainer: nn.Module, tx: optax.GradientTransformation, *, ema: bool
) -> Callable[[jax.Array, Mapping[str, jax.Array]], TrainState]:
  """`init(key, batch) -> TrainState`, its leaves boxed with their logical axes."""

  def init(key, batch):
    return _first(_variables(_ById(pretrainer))(key, batch), tx, ema)

  return init


def _first(variables, tx, ema):
  """The state of a run that has made no step."""
  params = variables["params"]
  return TrainState(
    step=jnp.int32(0),
    params=params,
    opt_state=tx.init(params),
    ema=jax.tree.map(jnp.copy, params) if ema else None,
    memory=variables.get("memory", {}),
  )


def _a_key():
  """The shape of a key: to make one compiles a program."""
  return jax.eval_shape(lambda: prng.key(0))


def abstract_variables(pretrainer: nn.Module, batch: Mapping[str, Any]) -> Any:
  """Shapes of what `init` makes, boxed: no memory, no computation.

  {"params": …, "memory": …}, the leaves with their logical axes.
  """
  return jax.eval_shape(_variables(_ById(pretrainer)), _a_key(), batch)


def abstract_params(pretrainer: nn.Module, batch: Mapping[str, Any]) -> Any:
  """Shapes of the parameters, without boxes."""
  return nn.unbox(abstract_variables(pretrainer, batch)["params"])


def abstract_state(
  pretrainer: nn.Module,
  tx: optax.GradientTransformation,
  batch: Mapping[str, jax.ShapeDtypeStruct],
  *,
  ema: bool,
  mesh: jax.sharding.Mesh,
  sharding: sharding_lib.Sharding,
  variables: Any = None,
) -> TrainState:
  """Shapes, dtypes and shardings of the state: no memory, no computation.

  variables: the `abstract_variables`, if known.
  """
  if variables is None:
    variables = abstract_variables(pretrainer, batch)
  # Outside of the mesh context: constants boxed inside it cannot be evaluated.
  boxed = jax.eval_shape(functools.partial(_first, tx=tx, ema=ema), variables)
  places = sharding_lib.shardings(boxed, mesh, sharding)
  return jax.tree.map(
    lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place),
    nn.unbox(boxed),
    places,
  )


def init_program(
  pretrainer: nn.Module,
  tx: optax.GradientTransformation,
  batch: Mapping[str, jax.ShapeDtypeStruct],
  *,
  seed: int,
  ema: bool,
  mesh: jax.sharding.Mesh,
  sharding: sharding_lib.Sharding,
  where: TrainState | None = None,
) -> Program:
  """The program of a fresh state, made where it is to live: never whole on one device.

  where: its shapes and shardings, if known; None: as `abstract_state` has them.
  """
  if where is None:
    where = abstract_state(pretrainer, tx, batch, ema=ema, mesh=mesh, sharding=sharding)
  init = make_init(pretrainer, tx, ema=ema)

  def make():
    example = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), dict(batch))
    return nn.unbox(init(prng.key(seed), example))

  places = jax.tree.map(lambda x: x.sharding, where)
  return Program("state", jax.jit(make, out_shardings=places), (), options=_once(mesh))


def init_state(*given: Any, **settings: Any) -> TrainState:
  """What `init_program` makes."""
  program = init_program(*given, **settings)
  program.compiled = program.compile(program.lower())
  return program()


def _once(mesh):
  """Compiler options of a program that runs once.

  On a GPU, XLA tries out how to run every fusion: more than half a minute for the state
  of CLIP L/14, which is then drawn in milliseconds.
  """
  platform = mesh.devices.flat[0].platform
  return {"xla_gpu_autotune_level": 0} if platform == "gpu" else None


def make_train_step(
  pretrainer: nn.Module,
  tx: optax.GradientTransformation,
  *,
  seed: int,
  ema_decay: float | None,
  schedule: Callable[[jax.Array], jax.Array],
) -> Callable[[TrainState, Mapping], tuple[TrainState, dict[str, reduce.Mean]]]:
  """`step(state, batch) -> (state, metrics)`, to be jitted with the state donated.

  As in ALBEF's official code, the teacher is updated first, from the parameters as
  they come in; then it teaches; then the optimiser moves the parameters.

  Returns:
    The function; its metrics are "loss", those of the pretrainer, "grad_norm" before
    clipping and "learning_rate".
  """

  def step(state, batch):
    ema = state.ema
    if ema_decay is not None:
      ema = tree.ema(ema, state.params, decay=ema_decay)

    rngs = keys(seed, state.step)

    def loss_of(params, drawn):
      (loss, metrics), new = pretrainer.apply(
        {"params": params, "memory": state.memory},
        batch,
        step=state.step,
        teacher_params=ema,
        train=True,
        rngs=rngs,
        **({} if drawn is None else {"drawn": drawn}),
        mutable=["memory"],
      )
      return loss.value(), (loss, metrics, new.get("memory", {}))

    def run(drawn):
      return jax.grad(loss_of, has_aux=True)(state.params, drawn)

    metrics_of = lambda drawn: loss_of(state.params, drawn)[1][1]
    grads, (loss, metrics, memory) = draw_lib.one(
      run, metrics_of, pretrainer.shares, rngs["draw"]
    )
    state = state.replace(ema=ema, memory=memory)
    return update(state, tx, grads, {"loss": loss, **metrics}, schedule)

  return step


def update(
  state: TrainState,
  tx: optax.GradientTransformation,
  grads: Any,
  metrics: dict[str, reduce.Mean],
  schedule: Callable[[jax.Array], jax.Array],
) -> tuple[TrainState, dict[str, reduce.Mean]]:
  """(state, metrics) after the optimiser has moved the parameters by a gradient."""
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  one = functools.partial(reduce.Mean, weight=jnp.float32(1.0))
  metrics = {
    **metrics,
    "grad_norm": one(optax.tree.norm(grads)),
    "learning_rate": one(jnp.float32(schedule(state.step))),
  }
  new_state = state.replace(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    opt_state=opt_state,
  )
  return new_state, metrics
