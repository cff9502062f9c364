"""The job of a run: all that it is made of, and checks that the parts go together."""

from collections.abc import Callable
import dataclasses
import functools
import inspect
import re
from typing import Any

from etils import epath
import flax.linen as nn
import jax
import optax

from vlp_jax import batch as batch_lib
from vlp_jax import build
from vlp_jax import clock as clock_lib
from vlp_jax import config as config_lib
from vlp_jax import feeds as feeds_lib
from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.data import turns as turns_lib
from vlp_jax.training import accumulate
from vlp_jax.training import ahead
from vlp_jax.training import guard as guard_lib
from vlp_jax.training import microbatch
from vlp_jax.training import optim as optim_lib
from vlp_jax.training import preemption as preemption_lib
from vlp_jax.training import sharding as sharding_lib
from vlp_jax.training import step as step_lib
from vlp_jax.training import stepping as stepping_lib


@dataclasses.dataclass(frozen=True)
class Job:
  """All that a run is made of, before anything is computed.

  Attributes:
    config: checked. workdir: where the run keeps everything.
    source, tokenizer: of the training data; None where only shapes are asked for.
    time: turns durations into steps.
    pretrainer: model and objectives.
    mesh, sharding: where arrays live.
    tx, schedule: the optimiser and its learning rate.
    guard, preemption: what is done about bad steps, and about notices to stop.
    variables: `step.abstract_variables` of the pretrainer.
    batch: ShapeDtypeStructs of a global batch; of several kinds of data, {kind: those}.
    feeds: {kind: data}. turns: the kinds that each step reads; None: there is one.
  """

  config: config_lib.Run
  workdir: epath.Path | None
  source: Any
  tokenizer: Any
  time: clock_lib.Clock
  pretrainer: pretrainer_lib.Pretrainer
  mesh: jax.sharding.Mesh
  sharding: sharding_lib.Sharding
  tx: optax.GradientTransformation
  schedule: Callable
  guard: guard_lib.Guard
  preemption: preemption_lib.Preemption
  variables: Any
  batch: dict[str, Any]
  feeds: dict[str, feeds_lib.Feed]
  turns: turns_lib.Turns | None = None

  @property
  def has_teacher(self) -> bool:
    return self.config.ema_decay is not None

  @functools.cached_property
  def abstract_state(self) -> step_lib.TrainState:
    """Shapes and places of the train state: no memory, no computation."""
    return step_lib.abstract_state(
      self.pretrainer,
      self.tx,
      self.batch,
      ema=self.has_teacher,
      mesh=self.mesh,
      sharding=self.sharding,
      variables=self.variables,
    )

  @property
  def readings(self) -> tuple[stepping_lib.Reading, ...]:
    """What steps read: of one kind of data all the same, of several as in `turns`."""
    if self.turns is None:
      return (stepping_lib.Reading("", 1.0, self.batch),)
    return tuple(
      stepping_lib.Reading(entry, share, {k: self.batch[k] for k in entry.split("+")})
      for entry, share in self.turns.shares.items()
    )

  @property
  def layout(self) -> microbatch.Layout:
    """The microbatches of a step.

    Raises:
      ValueError: `config.accumulate` cannot be had.
    """
    return microbatch.layout(
      self.pretrainer.objectives,
      batch_size=self.config.batch_size,
      count=self.config.accumulate,
      parts=sharding_lib.batch_parts(self.mesh),
      lanes=sharding_lib.lanes(self.mesh, self.sharding),
    )


def make(
  config: config_lib.Run, workdir: epath.Path, start: ahead.Programs = ahead.NOTHING
) -> Job:
  """Checks a config as a whole, and builds what it names.

  Args:
    start: what is known of the last start of this config; it is told here what this one
      is made of.

  Raises:
    ValueError, FileNotFoundError: what is wrong, where, and what to do about it; before
      anything is compiled.
  """
  config_lib.check(config)
  mesh = sharding_lib.make_mesh(sharding_lib.Sharding(**config.sharding))
  sharding_lib.check_batch(config.batch_size, mesh)
  train_source = build.source(config.data.source)
  words = build.tokenizer(config.tokenizer, train_source, workdir)
  facts = dict(vocab=words.vocab, length=words.length, examples=len(train_source))
  start.given(repr(facts | {"vocab": dataclasses.astuple(words.vocab)}), mesh)
  built = shapes(config, mesh, **facts, start=start)
  rows(built)  # checked now, before anything is compiled
  sources = {config_lib.PAIRS: train_source}
  for name, spec in config.data.kinds.items():
    sources[name] = build.source(spec["source"], f"data.kinds.{name}.source")
    sharding_lib.check_batch(built.feeds[name].batch_size, mesh)
  return dataclasses.replace(
    built,
    workdir=workdir,
    source=train_source,
    tokenizer=words,
    feeds=feeds_lib.feeds(config, sources, built.pretrainer),
  )


def shapes(
  config: config_lib.Run,
  mesh: jax.sharding.Mesh,
  *,
  vocab: Any,
  length: int,
  examples: int,
  start: ahead.Programs = ahead.NOTHING,
) -> Job:
  """The job of a run without its data: what `plan` compiles.

  Args:
    mesh: perhaps of devices that are not here.
    vocab, length: of the tokenizer. examples: an epoch.
    start: see `make`; it was told all of these.
  """
  turns = feeds_lib.turns(config)
  trained, batch, time = trained_on(
    config, vocab=vocab, length=length, examples=examples
  )
  optim = build.optim(config.optim, time)
  _check_frozen(trained.model, optim)
  # A second and more: the whole model is gone through.
  variables = start.kept(
    "variables", lambda: step_lib.abstract_variables(trained, batch)
  )
  params = nn.unbox(variables["params"])
  tx, schedule = optim_lib.make(optim, params, total_steps=time.total)
  made = Job(
    config=config,
    workdir=None,
    source=None,
    tokenizer=None,
    time=time,
    pretrainer=trained,
    mesh=mesh,
    sharding=sharding_lib.Sharding(**config.sharding),
    tx=tx,
    schedule=schedule,
    guard=guard_lib.Guard(**config.guard),
    preemption=preemption_lib.Preemption(**config.preemption),
    variables=variables,
    batch=batch,
    feeds=feeds_lib.feeds(config, {}, trained),
    turns=turns,
  )
  _check_accumulates(made)
  return made


def trained_on(
  config: config_lib.Run, *, vocab: Any, length: int, examples: int
) -> tuple[pretrainer_lib.Pretrainer, dict[str, Any], clock_lib.Clock]:
  """Model and objectives, a global batch of theirs, and the clock of the run."""
  time = clock_lib.of(config, examples)
  trained = build.pretrainer(config, vocab=vocab, length=length, time=time)
  fed = feeds_lib.feeds(config, {}, trained)
  batch = batch_lib.of(fed, trained.model.image, length)
  return trained, batch, time


def _check_frozen(model, optim):
  """That what makes targets is not moved: it has no gradient, but would decay."""
  if model.codebook is None:
    return
  found = [f for p, f in optim.multipliers if re.search(p, "model/codebook/")]
  if not found or found[0]:
    raise ValueError(
      "config: model.codebook makes targets, and is not trained: say"
      ' optim.multipliers=((r"^model/codebook/", 0.0), …).'
    )


def _check_accumulates(job):
  """That a step can be had by microbatches, where the config wants it."""
  if job.config.accumulate == 1:
    return
  if job.turns is not None:
    raise ValueError(
      f"config: accumulate={job.config.accumulate}: a run over several kinds of data"
      f" ({', '.join(job.feeds)}) takes whole batches: set accumulate=1."
    )
  if job.pretrainer.shares:
    raise ValueError(
      f"config: accumulate={job.config.accumulate}: objectives with a share"
      f" ({', '.join(job.pretrainer.shares)}) are drawn for a whole batch: set"
      " accumulate=1."
    )
  if job.abstract_state.memory.get("model"):
    raise ValueError(
      f"config: accumulate={job.config.accumulate}: model.image keeps statistics of the"
      " whole batch (batch norm): set accumulate=1."
    )


def stepping(job: Job) -> stepping_lib.Whole | stepping_lib.Streamed:
  """The train step, as the run takes it."""
  given = (job.pretrainer, job.tx)
  how = dict(
    seed=job.config.seed, ema_decay=job.config.ema_decay, schedule=job.schedule
  )
  judged = functools.partial(guard_lib.guarded, guard=job.guard, schedule=job.schedule)
  if job.config.accumulate == 1:
    step = judged(step_lib.make_train_step(*given, **how))
    return stepping_lib.Whole(step, job.abstract_state, job.readings, job.mesh)
  reads = pretrainer_lib.ACROSS
  stages = accumulate.make_stages(*given, layout=job.layout, reads=reads, **how)
  if job.config.accumulate_stream:
    own = stages.judged(judged)
    return stepping_lib.Streamed(own, job.abstract_state, job.batch, job.mesh)
  step = judged(accumulate.make_train_step(stages))
  return stepping_lib.Whole(step, job.abstract_state, job.readings, job.mesh)


def fresh_state(job: Job, start: ahead.Programs = ahead.NOTHING) -> step_lib.TrainState:
  """The state that a run starts from, where it starts from no other model's weights."""
  program = step_lib.init_program(
    job.pretrainer,
    job.tx,
    job.batch,
    seed=job.config.seed,
    ema=job.has_teacher,
    mesh=job.mesh,
    sharding=job.sharding,
    where=job.abstract_state,
  )
  start.ready(program)
  return program()


def programs(job: Job) -> list[stepping_lib.Program]:
  """All that a step of the run compiles, with the shapes it is called with."""
  return stepping(job).programs


def rows(job: Job) -> dict[str, Any]:
  """The rows of a batch that this process reads, and in which pieces.

  They are arguments of `pipeline.train_batches`.

  Raises:
    ValueError: a microbatch would have rows of other processes, or a teacher's update
      could not be taken back.
  """
  size, layout = job.config.batch_size, job.layout
  mine = sharding_lib.local_rows(size, job.mesh)
  if not job.config.accumulate_stream:
    return dict(rows=mine)
  if jax.process_count() > 1 and layout.parts != sharding_lib.batch_parts(job.mesh):
    raise ValueError(
      "config: accumulate_stream=True: neighbours that have to stay together"
      " (objectives.itm.group) lie on several devices, which several processes cannot"
      " stream: choose a smaller group, or lower accumulate."
    )
  if job.guard.decides and job.has_teacher:
    raise ValueError(
      "config: accumulate_stream=True moves the teacher (ema_decay) before the guard"
      ' can judge a step: say guard.nonfinite="stop" and guard.spike=None, or'
      " accumulate_stream=False."
    )
  runs = len(mine) * layout.parts // size
  return dict(rows=mine, pieces=layout.count, runs=runs)


def evaluators(job: Job) -> dict[str, Any]:
  """{name: evaluator}, bound to the model and to their data."""
  built = {}
  for name, spec in job.config.evals.items():
    where = f"evals.{name}"
    spec = {k: v for k, v in spec.items() if k != "every"}
    data = spec.pop("data", None)
    if not data or "source" not in data or "pp" not in data:
      raise ValueError(f"config: {where}.data is missing: say dict(source=…, pp=…).")
    batch_size = spec.pop("batch_size", job.config.batch_size)
    built[name] = build.component("evaluators", spec, where, default=name)
    more = {}
    if "file" in inspect.signature(built[name].setup).parameters:
      more["file"] = job.workdir / "predictions" / f"{name}.json"
    built[name].setup(
      pretrainer=job.pretrainer,
      source=build.source(data["source"], f"{where}.data.source"),
      tokenizer=job.tokenizer,
      pp=data["pp"],
      mesh=job.mesh,
      batch_size=batch_size,
      **more,
    )
  return built
