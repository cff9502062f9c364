"""The run: what happens, in the order in which it happens."""

import contextlib
import json
import logging
import math
import pathlib
import platform
import signal
import time

import jax
import ml_collections

from vlp_jax import build
from vlp_jax import cli
from vlp_jax import config as config_lib
from vlp_jax import feeds
from vlp_jax import report
from vlp_jax.data import pipeline
from vlp_jax.evaluators import retrieval
from vlp_jax.interop import initial
from vlp_jax.ops import tree
from vlp_jax.training import checkpoint
from vlp_jax.training import preemption
from vlp_jax.training import sharding
from vlp_jax.training import step as step_lib
from vlp_jax.training import timing
from vlp_jax.training import writer as writer_lib

_log = logging.getLogger("vlp_jax")


def train(given: ml_collections.ConfigDict, workdir: pathlib.Path) -> int:
  """Trains, evaluates and reports; goes on with what is in the workdir.

  Returns:
    Exit code: 0, or 128 + the number of the signal that stopped the run.

  Raises:
    ValueError, OSError: the config, the data or the workdir is not as it must be.
    FloatingPointError: a loss is no number; the last good checkpoint is kept.
  """
  # --- What is to be run: every mistake of the user shows here -------------------
  start_time = time.time()
  config, job, first = _open(given, workdir)
  abstract = job.abstract_state()
  evaluators = build.evaluators(job)
  steps = job.time.steps
  log_every, save_every = steps(config.log.every), steps(config.checkpoint.every)
  eval_every = {n: steps(e.get("every", "100%")) for n, e in config.evals.items()}
  checkpoints = _checkpoints(job)

  # --- State: restored, or fresh -------------------------------------------------
  if checkpoints.steps():
    state, meta = checkpoints.restore(abstract)
    position = meta["position"]
    _tell(first, f"goes on from step {int(state.step)} in {workdir}")
  else:
    state, position = None, 0

  # --- Data and step -------------------------------------------------------------
  begun = 0 if state is None else int(state.step)
  batches = feeds.batches(job, step=begun, position=position)
  fitting = build.check_batches(job, batches)
  if state is None:
    state = _fresh(job, abstract)
  _tell(first, _summary(job, state))
  waiting = timing.Waiting(sharding.prefetch(fitting, job.mesh))
  train_step = jax.jit(
    step_lib.make_train_step(
      job.pretrainer,
      job.tx,
      seed=config.seed,
      ema_decay=config.ema_decay,
      schedule=job.schedule,
    ),
    donate_argnums=0,
    out_shardings=(
      jax.tree.map(lambda x: x.sharding, abstract),
      sharding.replicated(job.mesh),
    ),
  )

  # --- The loop ------------------------------------------------------------------
  total = job.time.total
  turns = 1 if job.turns is None else len(job.turns.cycle)
  writer = writer_lib.NoWriter()
  if first:
    writer = writer_lib.Writer(workdir, start=begun, tensorboard=config.log.tensorboard)
  progress = timing.Progress(
    start=begun,
    total=total,
    batch_size=config.batch_size,
    waiting=waiting,
    quiet=not first,
  )
  profiler = _profiler(job)
  results: dict[str, dict[str, float]] = {}
  with (
    contextlib.closing(batches),
    contextlib.closing(writer),
    preemption.Stop() as stop,
    sharding.use(job.mesh, job.sharding),
  ):
    for step in range(begun, total):
      profiler.before(step)
      state, metrics = train_step(state, next(waiting))
      done = step + 1
      position += config.batch_size
      # Once a step: a signal that comes later in it is for the next.
      asked = stop.asked
      ended = done == total
      if done == begun + 1:
        jax.block_until_ready(state.step)
        progress.compiled(done)

      due = [n for n, every in eval_every.items() if ended or done % every == 0]
      saves = ended or asked or done % save_every == 0 or _is_best_due(config, due)
      logs = _is_logged(done, log_every, turns)
      if logs or saves:
        # The only place where the loop waits for the device. What is logged is the
        # step's own value: the same whether or not the run was interrupted before it.
        values = {key: float(mean.value()) for key, mean in metrics.items()}
        _check_finite(values, done, checkpoints)
        if logs or ended:
          rates = progress.rates(done)
          writer.write(done, values | {"examples": position} | rates)
          progress.show(done, values["loss"], rates)

      for name in due:
        with progress.paused():
          results[name] = evaluators[name](state.params)
        writer.write(done, {f"{name}/{k}": v for k, v in results[name].items()})
      if saves:
        with progress.paused():
          flat = {f"{n}/{k}": v for n in due for k, v in results[n].items()}
          meta = {"position": position, "seed": config.seed}
          checkpoints.save(done, state, meta, flat)
      if asked and not ended:
        break
  profiler.stop()
  progress.close()
  _tell_bad(first, batches)
  checkpoints.finish()

  # --- What came of it -----------------------------------------------------------
  if stop.asked and int(state.step) < total:
    _tell(
      first,
      f"stopped by {stop.asked} at step {int(state.step)}, which is saved:"
      " the same command goes on from there.",
    )
    return 128 + signal.Signals[stop.asked]
  if begun == total:
    with sharding.use(job.mesh, job.sharding):
      results = {name: each(state.params) for name, each in evaluators.items()}
  if first:
    _report(job, state, evaluators, results, seconds=time.time() - start_time)
  return 0


def evaluate(
  given: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  *,
  step: int | None = None,
  best: bool = False,
) -> dict[str, dict[str, float]]:
  """Runs every evaluation on a checkpoint of the workdir, and reports.

  Args:
    step: of the checkpoint; None: the newest, or the best.
  """
  start_time = time.time()
  _, job, first = _open(given, workdir)
  evaluators = build.evaluators(job)
  checkpoints = _checkpoints(job)
  if best:
    step = checkpoints.best_step()
    if step is None:
      raise ValueError("--best: no checkpoint has the metric config.checkpoint.best.")
  state, _ = checkpoints.restore(job.abstract_state(), step)
  with sharding.use(job.mesh, job.sharding):
    results = {name: each(state.params) for name, each in evaluators.items()}
    if first:
      _report(job, state, evaluators, results, seconds=time.time() - start_time)
  return results


# --- Parts of the above --------------------------------------------------------


def _open(given, workdir):
  """(checked config, job, whether this process writes); makes the workdir."""
  config = config_lib.run(given)
  workdir = pathlib.Path(workdir).resolve()
  workdir.mkdir(parents=True, exist_ok=True)
  job = build.job(config, workdir)
  first = jax.process_index() == 0
  if first:
    (workdir / cli.CONFIG_FILE).write_text(config_lib.to_json(given), "utf-8")
  return config, job, first


def _checkpoints(job):
  return checkpoint.Checkpoints(
    job.workdir / "checkpoints",
    keep=job.config.checkpoint.keep,
    best=job.config.checkpoint.best,
  )


def _fresh(job, abstract):
  """A new state; with `config.init`, on top of the weights of another model."""
  loaded = None
  if job.config.init is not None:
    # First, with shapes alone: a file that does not fit is told before any compiling.
    model = job.pretrainer.model
    loaded = initial.load(job.config.init, abstract.params, model=model)
  state = step_lib.init_state(
    job.pretrainer,
    job.tx,
    job.batch,
    seed=job.config.seed,
    ema=job.has_teacher,
    mesh=job.mesh,
    sharding=job.sharding,
  )
  if loaded is None:
    return state
  params = jax.tree.map(
    lambda new, own: own if isinstance(new, jax.ShapeDtypeStruct) else new,
    loaded,
    state.params,
  )
  places = jax.tree.map(lambda x: x.sharding, abstract.params)
  params = jax.device_put(params, places)
  teacher = jax.device_put(params, places) if job.has_teacher else None
  return state.replace(params=params, ema=teacher)


def _profiler(job):
  profile = job.config.profile
  start, steps = (
    (-1, 0) if profile is None else (job.time.steps(profile.start), profile.steps)
  )
  return timing.Profiler(str(job.workdir / "profile"), start=start, steps=steps)


def _is_logged(done, every, turns):
  """Whether a step is written down: each of the last turns before one that is due.

  So every kind of data has its lines, though each line is of one step.
  """
  return -done % every < turns


def _is_best_due(config, due):
  """Whether an evaluation that is due decides what the best checkpoint is."""
  best = config.checkpoint.best
  return best is not None and any(best.startswith(f"{name}/") for name in due)


def _check_finite(values, step, checkpoints):
  wrong = [key for key, value in values.items() if not math.isfinite(value)]
  if wrong:
    checkpoints.wait()
    there = checkpoints.steps()
    raise FloatingPointError(
      f"step {step}: not finite: {', '.join(wrong)}. The last good checkpoint is kept:"
      f" {f'step {there[-1]}' if there else 'none yet'}."
      " Lower optim.lr, set optim.clip_norm, or lengthen optim.warmup."
    )


def _tell(first, text):
  if first:
    _log.info("%s", text)


def _tell_bad(first, batches):
  if first and batches.bad:
    counts = ", ".join(f"{count} {reason}" for reason, count in batches.bad.items())
    _log.warning("data: broken records were passed over: %s.", counts)


def _summary(job, state):
  sizes = {name: tree.size(part) for name, part in state.params["model"].items()}
  parts = ", ".join(f"{n} {s / 1e6:.1f} M" for n, s in sizes.items() if s > 50_000)
  mesh = "x".join(str(size) for size in job.mesh.devices.shape)
  device = job.mesh.devices.flat[0]
  return (
    f"{tree.size(state.params) / 1e6:.1f} M parameters ({parts});"
    f" {job.time.total} steps of {job.config.batch_size} examples;"
    f" {job.mesh.size} x {device.device_kind}, mesh {mesh}"
  )


def _report(job, state, evaluators, results, *, seconds):
  """The table on the terminal, results.json and report.html."""
  config, workdir = job.config, job.workdir
  (workdir / "results.json").write_text(json.dumps(results, indent=2) + "\n", "utf-8")
  found, maps = {}, []
  for name, evaluator in evaluators.items():
    if isinstance(evaluator, retrieval.Evaluator) and evaluator.last is not None:
      data = config.evals[name]["data"]
      source = build.source(data["source"], f"evals.{name}.data.source")
      found[name] = (evaluator.last, report.reader(source))
      # Maps are computed, which on several processes only all together can do.
      if not maps and evaluator.rerank and jax.process_count() == 1:
        batch = next(
          iter(pipeline.eval_pairs(source, data["pp"], job.tokenizer, batch_size=8))
        )
        maps = report.word_maps(job.pretrainer, state.params, batch, job.tokenizer)
  device = job.mesh.devices.flat[0]
  page = report.write(
    workdir,
    title=f"vlp_jax: {workdir.name}",
    results=results,
    facts={
      "Parameters": f"{tree.size(state.params):,}",
      "Steps": f"{int(state.step):,} of {config.batch_size} examples",
      "Machine": f"{job.mesh.size} x {device.device_kind} ({platform.machine()})",
      "This call took": f"{seconds / 60:.1f} minutes",
      "Seed": str(config.seed),
    },
    config="\n".join(config_lib.flatten(config)),
    log=workdir / "metrics.jsonl",
    objectives=list(config.objectives),
    found=found,
    maps=maps,
  )
  print(report.table(results), flush=True)
  _log.info("report: %s", page)
