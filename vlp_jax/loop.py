"""The run: what happens, in the order in which it happens."""

import contextlib
import gc
import logging
import platform
import time

from etils import epath
import jax
from jax.experimental import multihost_utils
import ml_collections
import numpy as np

from vlp_jax import batch as batch_lib
from vlp_jax import build
from vlp_jax import cli
from vlp_jax import config as config_lib
from vlp_jax import config_file
from vlp_jax import feeds
from vlp_jax import job as job_lib
from vlp_jax import places
from vlp_jax import report
from vlp_jax.data import evaluation
from vlp_jax.data import pp
from vlp_jax.evaluators import placement
from vlp_jax.evaluators import retrieval
from vlp_jax.interop import initial
from vlp_jax.ops import tree
from vlp_jax.training import ahead
from vlp_jax.training import cache
from vlp_jax.training import checkpoint
from vlp_jax.training import course
from vlp_jax.training import guard
from vlp_jax.training import preemption
from vlp_jax.training import sharding
from vlp_jax.training import stepping
from vlp_jax.training import timing
from vlp_jax.training import writer as writer_lib

_log = logging.getLogger("vlp_jax")


def train(
  given: ml_collections.ConfigDict,
  workdir: epath.PathLike,
  start: ahead.Programs = ahead.NOTHING,
) -> int:
  """Trains, evaluates and reports; goes on with what is in the workdir.

  Args:
    start: what is known of the last start of this config. The code that is loaded has
      to be that of its files.

  Returns:
    Exit code: 0, or 128 + the number of the signal that stopped the run.

  Raises:
    ValueError, OSError: the config, the data or the workdir is not as it must be.
    FloatingPointError: a loss is no number; the last good checkpoint is kept.
  """
  start_time = time.time()
  # Every mistake of the user shows here.
  job, first = _open(given, workdir, start)
  if first:
    # Not by an evaluation: what is switched off for it, is on when the run goes on.
    (job.workdir / cli.CONFIG_FILE).write_text(config_file.to_json(given))
  with preemption.Stop(job.preemption) as stop, course.at("starts", limited=False):
    return _train(job, stop, start, first=first, start_time=start_time)


def _train(job, stop, start, *, first, start_time):
  # --- What is to be run ---------------------------------------------------------
  config, workdir = job.config, job.workdir
  abstract = job.abstract_state
  evaluators = job_lib.evaluators(job)
  steps = job.time.steps
  log_every, save_every = steps(config.log.every), steps(config.checkpoint.every)
  eval_every = {n: steps(e.get("every", "100%")) for n, e in config.evals.items()}
  checkpoints = _checkpoints(job)

  # --- State: restored, or fresh -------------------------------------------------
  if checkpoints.steps():
    with course.at("reads", "the last checkpoint"):
      state, meta = checkpoints.restore(abstract)
    position = meta["position"]
    _tell(first, f"goes on from step {int(state.step)} in {workdir}")
  else:
    state, meta, position = None, {}, 0

  # --- Data and step -------------------------------------------------------------
  batches = feeds.batches(job, job_lib.rows(job), position=position)
  batch_lib.check(job, batches.sample())
  weights = _weights(job, abstract) if state is None else None
  train_step = job_lib.stepping(job)
  programs = (train_step.programs, job.mesh, job.sharding)
  with stepping.compiling(*programs, start) as traced:
    traced.result()
    if state is None:
      state = _fresh(job, abstract, weights, start)
  start.end()
  begun = done = int(state.step)
  _tell(first, _summary(job, state))
  waiting = timing.Waiting(train_step.feed(batches))

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
  watch = guard.Watch(job.guard, state.guard, rolled_back=meta.get("rolled_back", 0))
  if job.guard.rolls_back and not checkpoints.steps():
    with course.at("saves", "step 0"):
      checkpoints.save(0, state, {"position": 0, "seed": config.seed})
  results: dict[str, dict[str, float]] = {}
  with (
    contextlib.ExitStack() as until_the_end,
    contextlib.closing(writer),
    sharding.use(job.mesh, job.sharding),
  ):
    until_the_end.enter_context(contextlib.closing(batches))
    profiler = _profiler(job, until_the_end)

    def evaluate_now(names):
      for name in names:
        with progress.paused():
          results[name] = _evaluated(name, evaluators[name], state, done)
        writer.write(done, {f"{name}/{k}": v for k, v in results[name].items()})

    evaluate_now(_owed(meta, evaluators, writer, begun))
    while done < total:
      profiler.before(done)
      state, metrics = train_step(state, next(waiting))
      done += 1
      position += config.batch_size
      # Once a step: a notice that comes later in it is for the next.
      asked = stop.reached()
      ended = done == total
      if done == begun + 1:
        jax.block_until_ready(state.step)
        progress.count_from(done)
        course.turn_to("trains")

      due = [n for n, every in eval_every.items() if ended or done % every == 0]
      decides = not asked and _decides_best(config, due)
      saves = ended or asked or decides or done % save_every == 0
      saves = saves or checkpoints.retry_due(done)
      logs = _is_logged(done, log_every, turns)
      if logs or saves:
        # The only place where the loop waits for the device. What is logged is the
        # step's own value: the same whether or not the run was interrupted before it.
        values = guard.floats(metrics)
        bad = watch.look(values, done, checkpoints.kept)
        if bad is not None:
          position -= (done - bad) * config.batch_size
          with course.at("reads", "the last good checkpoint"):
            state, _ = checkpoints.restore(abstract)
          done = int(state.step)
          _tell(first, f"goes back to step {done}, and on after the data of step {bad}")
          batches.close()
          batches = feeds.batches(job, job_lib.rows(job), position=position)
          until_the_end.enter_context(contextlib.closing(batches))
          waiting.go_on_with(train_step.feed(batches))
          watch.goes_on_from(state.guard)
          writer.cut(done)
          progress.count_from(done)
          continue
        if logs or ended:
          rates = progress.rates(done)
          writer.write(done, values | {"examples": position} | rates)
          progress.show(done, values["loss"], rates)
      if done == begun + 1:
        gc.enable()  # See train.py.

      # Evaluations can take long, so what is saved is saved before them, and owes them;
      # but for those that say whether it is the best.
      meta = {"position": position, "seed": config.seed, "owed": due}
      meta |= {"rolled_back": watch.rolled_back}
      last = ended or asked
      if saves and not decides:
        with progress.paused(), course.at("saves", f"step {done}"):
          writer.flush()
          checkpoints.save(done, state, meta, last=last)
      if asked and not ended:
        break
      evaluate_now(due)
      if decides:
        with progress.paused(), course.at("saves", f"step {done}"):
          writer.flush()
          flat = {f"{n}/{k}": v for n in due for k, v in results[n].items()}
          checkpoints.save(done, state, meta | {"owed": []}, flat, last=last)
  progress.close()
  _tell_bad(first, batches)
  with course.at("saves", f"step {done}, the last"):
    checkpoints.finish()

  # --- What came of it -----------------------------------------------------------
  if stop.asked and int(state.step) < total:
    _tell(
      first,
      f"stopped by {stop.asked} at step {int(state.step)}, which is saved:"
      " the same command goes on from there.",
    )
    return stop.code
  with sharding.use(job.mesh, job.sharding):
    for name in evaluators:
      if name not in results:
        results[name] = _evaluated(name, evaluators[name], state, done)
  if first:
    with course.at("reports"):
      _report(job, state, evaluators, results, seconds=time.time() - start_time)
  return 0


def evaluate(
  given: ml_collections.ConfigDict,
  workdir: epath.PathLike,
  *,
  step: int | None = None,
  best: bool = False,
) -> dict[str, dict[str, float]]:
  """Runs every evaluation on a checkpoint of the workdir, and reports.

  Args:
    step: of the checkpoint; None: the newest, or the best.
  """
  start_time = time.time()
  job, first = _open(given, workdir)
  evaluators = job_lib.evaluators(job)
  checkpoints = _checkpoints(job)
  if best:
    step = checkpoints.best_step()
    if step is None:
      raise ValueError("--best: no checkpoint has the metric config.checkpoint.best.")
  with course.at("reads", "a checkpoint"):
    state, _ = checkpoints.restore(job.abstract_state, step)
  with sharding.use(job.mesh, job.sharding):
    results = {
      name: _evaluated(name, evaluator, state, int(state.step))
      for name, evaluator in evaluators.items()
    }
    if first:
      with course.at("reports"):
        _report(job, state, evaluators, results, seconds=time.time() - start_time)
  return results


# --- Parts of the above --------------------------------------------------------


def _open(given, workdir, start=ahead.NOTHING):
  """(job, whether this process writes); makes the workdir."""
  config = config_lib.run(given)
  cache.use()
  workdir = places.workdir(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  job = job_lib.make(config, workdir, start)
  return job, jax.process_index() == 0


def _checkpoints(job):
  return checkpoint.Checkpoints(
    job.workdir / "checkpoints",
    keep=job.config.checkpoint.keep,
    best=job.config.checkpoint.best,
  )


def _weights(job, abstract):
  """(parameters, memory) of another model, as `config.init` says, or None.

  Shapes stand for what it does not have. Before anything is compiled: a file that does
  not fit is told first.
  """
  if job.config.init is None:
    return None
  model = job.pretrainer.model
  loaded = initial.load(job.config.init, abstract.params, model=model)
  return loaded, initial.load_memory(job.config.init, abstract.memory)


def _fresh(job, abstract, weights, start):
  """A new state, with the `weights` of another model."""
  state = job_lib.fresh_state(job, start)
  if weights is None:
    return state

  def put(new, own, shapes):
    filled = jax.tree.map(
      lambda new, own: own if isinstance(new, jax.ShapeDtypeStruct) else new, new, own
    )
    return jax.device_put(filled, jax.tree.map(lambda x: x.sharding, shapes))

  loaded, kept = weights
  params = put(loaded, state.params, abstract.params)
  teacher = put(loaded, state.ema, abstract.ema) if job.has_teacher else None
  memory = put(kept, state.memory, abstract.memory)
  return state.replace(params=params, ema=teacher, memory=memory)


def _evaluated(name, evaluator, state, step):
  """What it finds; the others are told how far this process is."""
  here = course.at("evaluates", f"{name} after step {step}")
  with here, placement.telling(course.go_on):
    return evaluator(state.variables())


def _profiler(job, until_the_end):
  """Of the steps that the config names; what it writes is in its place at the end."""
  profile = job.config.profile
  if profile is None:
    return timing.Profiler("", start=-1, steps=0)
  folder = until_the_end.enter_context(places.local(job.workdir / "profile"))
  start = job.time.steps(profile.start)
  profiler = timing.Profiler(str(folder), start=start, steps=profile.steps)
  until_the_end.callback(profiler.stop)
  return profiler


def _is_logged(done, every, turns):
  """Whether a step is written down: each of the last turns before one that is due.

  So every kind of data has its lines, though each line is of one step.
  """
  return -done % every < turns


def _owed(meta, evaluators, writer, step):
  """Evaluations of the checkpoint that the run was interrupted in, or before."""
  owed = [name for name in meta.get("owed", ()) if name in evaluators]
  if not owed or jax.process_count() == 1:
    return [name for name in owed if not writer.has(step, name)]
  # The log is the first process's.
  lacking = np.array([not writer.has(step, name) for name in owed])
  lacking = multihost_utils.broadcast_one_to_all(lacking)
  return [name for name, lacks in zip(owed, lacking, strict=True) if lacks]


def _decides_best(config, due):
  """Whether an evaluation that is due decides what the best checkpoint is."""
  best = config.checkpoint.best
  return best is not None and any(best.startswith(f"{name}/") for name in due)


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
  parts = f" ({parts})" if parts else ""
  mesh = "x".join(str(size) for size in job.mesh.devices.shape)
  device = job.mesh.devices.flat[0]
  return (
    f"{tree.size(state.params) / 1e6:.1f} M parameters{parts};"
    f" {job.time.total} steps of {job.config.batch_size} examples;"
    f" {job.mesh.size} x {device.device_kind}, mesh {mesh}"
  )


def _report(job, state, evaluators, results, *, seconds):
  """The table on the terminal, results.json and report.html.

  Evaluations that are switched off keep what they found before.
  """
  config, workdir, step = job.config, job.workdir, int(state.step)
  known, earlier = report.merge(workdir / "results.json", results, step=step)
  found, maps = {}, []
  for name, evaluator in evaluators.items():
    if isinstance(evaluator, retrieval.Evaluator) and evaluator.last is not None:
      data = config.evals[name]["data"]
      source = build.source(data["source"], f"evals.{name}.data.source")
      found[name] = (evaluator.last, report.reader(source))
      # Maps are computed, which on several processes only all together can do.
      # They are of pictures, and of models that are their parameters alone.
      mapped = not pp.leaves_regions(data["pp"]) and "model" not in state.memory
      if not maps and evaluator.rerank and mapped and jax.process_count() == 1:
        batch = next(
          iter(evaluation.eval_pairs(source, data["pp"], job.tokenizer, batch_size=8))
        )
        maps = report.word_maps(job.pretrainer, state.params, batch, job.tokenizer)
  device = job.mesh.devices.flat[0]
  with places.local(workdir, reads=["metrics.jsonl"]) as folder:
    page = report.write(
      folder,
      title=f"vlp_jax: {workdir.name}",
      results=known,
      earlier=earlier,
      facts={
        "Parameters": f"{tree.size(state.params):,}",
        "Steps": f"{step:,} of {config.batch_size} examples",
        "Machine": f"{job.mesh.size} x {device.device_kind} ({platform.machine()})",
        "This call took": f"{seconds / 60:.1f} minutes",
        "Seed": str(config.seed),
      },
      config="\n".join(config_file.flatten(config_lib.said(config))),
      log=folder / "metrics.jsonl",
      objectives=list(config.objectives),
      found=found,
      maps=maps,
    )
  if results:
    print(report.table(results), flush=True)
  if earlier:
    kept = ", ".join(f"{name} (step {of})" for name, of in earlier.items())
    _log.info("results.json keeps what was not evaluated this time: %s", kept)
  _log.info("report: %s", workdir / page.name)
