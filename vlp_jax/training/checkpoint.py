"""Checkpoints: state and data position in one, written in the background, whole or not.

Orbax writes to a temporary folder and renames it when all is there (in an object store:
puts a file beside it that says so), so a process that dies while it saves leaves the
checkpoints before it untouched. What a disk or a copy does to one later is found by
fingerprints of all arrays, which are saved with it: orbax takes a bit that has flipped
in an array's file for what was saved.
"""

from collections.abc import Mapping
import errno
import logging
import time
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from vlp_jax.ops import tree
from vlp_jax.training import course
from vlp_jax.training import seal

_TEMPORARY = "*.orbax-checkpoint-tmp*"
_DAMAGED = "damaged-"  # before the step, of a folder that is no checkpoint any more
# Seconds for what is written in the background: a large model may take longer than the
# 1,200 of orbax. Where all wait for it, `watch` has another limit.
SLOWEST = 3_600
RETRY = 10  # steps after a save that failed; twice as many after the next
# Seconds before the last save is tried again, unless it failed for what does not pass.
PAUSES = (2.0, 8.0, 30.0)
_LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_log = logging.getLogger(__name__)


class CheckpointError(OSError):
  """The run ended, and its last state is not on the disk."""


class Checkpoints:
  """The checkpoints of one run.

  Attributes:
    directory: one folder a step.
  """

  def __init__(
    self, directory: epath.PathLike, *, keep: int = 2, best: str | None = None
  ):
    """Opens the folder, makes it, and removes what an interrupted save left.

    Args:
      directory: of this run alone; on a disk, or gs://….
      keep: so many of the newest are kept.
      best: metric whose largest value's checkpoint is kept as well.
    """
    directory = epath.Path(directory)
    # An address is whole as it is, and orbax takes no relative folders.
    self.directory = directory if "://" in str(directory) else directory.resolve()
    self._keep, self._best = keep, best
    self._pending: int | None = None
    self._failure: tuple[int, BaseException] | None = None
    self._failed = 0  # saves in a row
    self._last: tuple | None = None
    self._damaged: list[int] = []
    logging.getLogger("absl").setLevel(logging.WARNING)
    self._manager = self._open()

  def _open(self):
    policies = [checkpoint_managers.LatestN(self._keep)]
    if self._best:
      value = lambda metrics: metrics[self._best]
      policies.append(
        checkpoint_managers.BestN(
          get_metric_fn=value, n=1, keep_checkpoints_without_metrics=False
        )
      )
    options = ocp.CheckpointManagerOptions(
      preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
      cleanup_tmp_directories=True,
      best_fn=(lambda metrics: metrics[self._best]) if self._best else None,
      enable_async_checkpointing=True,
      async_options=ocp.AsyncOptions(
        timeout_secs=SLOWEST,
        barrier_sync_fn=_meeting() if jax.process_count() > 1 else None,
      ),
    )
    # With names alone, a manager that has not saved yet cannot read what it finds.
    handlers = dict(
      state=ocp.StandardCheckpointHandler(), meta=ocp.JsonCheckpointHandler()
    )
    return ocp.CheckpointManager(
      self.directory, options=options, item_handlers=handlers
    )

  def steps(self) -> list[int]:
    """Steps of the checkpoints that are whole, ascending."""
    return sorted(self._manager.all_steps())

  def kept(self) -> str:
    """The newest of them in a sentence, for who has to stop."""
    self.wait()
    there = self.steps()
    newest = f"step {there[-1]}" if there else "none yet"
    return f"The last good checkpoint is kept: {newest}."

  def best_step(self) -> int | None:
    """The step whose metric `best` is largest; None without one."""
    return self._manager.best_step() if self._best else None

  def save(
    self,
    step: int,
    state: Any,
    meta: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
    *,
    last: bool = False,
  ) -> None:
    """Starts to save, and returns when the state may be overwritten.

    A save that fails is told in the log, and what is left of it removed; the
    checkpoints before it stay, and `retry_due` says when to try again.

    Args:
      step: of the run. state: any tree of arrays. meta: JSON.
      metrics: of this step; needs `best` among them for it to count as one.
      last: no step comes after it; `finish` tries it again with this state.
    """
    self.wait()
    self._last = (step, state, meta, metrics) if last else None
    if self._best and self._best not in (metrics or {}):
      metrics = None
    try:
      self._set_aside()
      if jax.process_count() > 1:
        course.writes(f"step {step}")
      flat = tree.flatten(state)
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(_nest(flat)),
          meta=ocp.args.JsonSave(seal.sealed(meta, seal.fingerprints(flat))),
        ),
        metrics=dict(metrics) if metrics and self._best else None,
      )
      error = None
    except Exception as failed:  # orbax wraps the system's errors in its own kinds
      error = failed
      course.written()
    if self._agreed(step, error):
      self._pending = step

  def wait(self) -> None:
    """Until the save that was started is on the disk, or has failed."""
    if self._pending is None:
      return
    step, self._pending = self._pending, None
    try:
      self._manager.wait_until_finished()
      error = None
    except Exception as failed:
      error = failed
    course.written()
    if self._agreed(step, error):
      self._failure, self._failed = None, 0

  def retry_due(self, step: int) -> bool:
    """Whether to save after this step because an earlier save failed.

    10 steps after it, 20 after the next failure in a row, and so on. With several
    processes always false: they would not all know at the same step, and save again
    when they would have anyway.
    """
    if jax.process_count() > 1:
      return False
    if self._pending is not None and not self._manager.is_saving_in_progress():
      self.wait()
    if self._failure is None or self._pending is not None:
      return False
    return step >= self._failure[0] + RETRY * 2 ** (self._failed - 1)

  def _agreed(self, step, error):
    """Whether no process failed; where one did, all of them give the save up."""
    if not _all_processes(error is None):
      self._fail(step, error or OSError("another process could not save its part"))
      return False
    return True

  def _fail(self, step, error):
    cause = error
    while cause.__cause__ is not None and not isinstance(cause, OSError):
      cause = cause.__cause__
    self._failure, self._failed = (step, cause), self._failed + 1
    try:
      self._manager.close()
    except Exception as again:  # the failed save, told a second time
      _log.debug("closing the failed manager: %s", again)
    try:
      if jax.process_index() == 0:
        for part in self.directory.glob(_TEMPORARY):
          part.rmtree(missing_ok=True)
      self._manager = self._open()
      there = self.steps()
    except Exception as again:  # the place is away altogether
      _log.debug("opening %s again: %s", self.directory, again)
      there = []
    _log.error(
      "checkpoint: step %d could not be saved in %s: %s. Training goes on and saves"
      " again later; the last whole checkpoint is %s.",
      step,
      self.directory,
      _line(cause),
      f"step {there[-1]}" if there else "not there: none was saved yet",
    )

  def finish(self) -> None:
    """Waits for the last save, and tries it again if it fails for what may pass.

    Raises:
      CheckpointError: it failed.
    """
    self.wait()
    for pause in PAUSES:
      if not self._failure or not self._last:
        break
      lasting = getattr(self._failure[1], "errno", None) in _LASTING
      if not _all_processes(not lasting):
        break
      _log.warning("checkpoint: tries to save again in %g seconds.", pause)
      time.sleep(pause)
      self.save(*self._last, last=True)
      self.wait()
    failure, self._last = self._failure, None
    self._manager.close()
    if failure:
      step, cause = failure
      raise CheckpointError(
        f"checkpoint: step {step} could not be saved in {self.directory}: {cause}."
        " Make room there (or check its permissions) and start again: the run goes on"
        " from its last whole checkpoint."
      ) from cause

  def restore(self, target: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
    """(state, meta) of a step, placed as `target` says; by default the newest.

    A checkpoint that cannot be read, or of which a bit is not as it was saved, is
    passed over with a warning for the one before; the next `save` puts it aside.

    Args:
      target: tree of ShapeDtypeStructs with shardings, as the state's.
      step: that one and no other.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is of another model; lists the paths that differ.
      OSError: it is damaged, and there is none before it or `step` names it.
    """
    self.wait()
    steps = self.steps()
    if not steps or (step is not None and step not in steps):
      there = f"there are steps {steps}" if steps else "there is none"
      wanted = "" if step is None else f" of step {step}"
      raise FileNotFoundError(f"checkpoint: none{wanted} in {self.directory}: {there}.")
    for candidate in [step] if step is not None else steps[::-1]:
      got = error = None
      try:
        self._check(candidate, target)
        got = self._read(candidate, target)
      except _OtherModelError:
        raise
      except Exception as failed:
        error = failed
      # Fingerprints are taken by all processes together, or by none.
      if _all_processes(error is None):
        try:
          return _verified(got, target)
        except OSError as failed:
          error = failed
      path = self.directory / str(candidate)
      error = error or OSError("another process cannot read its part")
      before = [s for s in steps if s < candidate]
      if step is not None or not before:
        others = [s for s in steps if s != candidate]
        raise OSError(
          f"checkpoint: {path} is damaged ({_line(error)}); whole ones may be the"
          f" others that are there: {others or 'none'}."
        ) from error
      self._damaged.append(candidate)
      _log.warning(
        "checkpoint: %s is damaged (%s): using step %d, the one before it, %s.",
        path,
        _line(error),
        before[-1],
        self.directory / str(before[-1]),
      )
    raise AssertionError("unreachable: the loop returns or raises")

  def _set_aside(self):
    """Renames damaged checkpoints: orbax saves nothing before a step that is there."""
    if not self._damaged:
      return
    error = None
    try:
      for step in self._damaged if jax.process_index() == 0 else ():
        aside = self.directory / f"{_DAMAGED}{step}"
        aside.rmtree(missing_ok=True)
        (self.directory / str(step)).rename(aside)
        _log.warning("checkpoint: what is damaged is in %s now.", aside)
    except OSError as failed:
      error = failed
    if not _all_processes(error is None):
      raise error or OSError("what is damaged cannot be put aside")
    self._damaged = []
    self._manager.reload()

  def arrays(self, step: int | None = None) -> dict[str, Any]:
    """All that a step saved, as nested dicts of numpy arrays: no model is wanted.

    Raises:
      FileNotFoundError: there is none.
    """
    steps = self.steps()
    if not steps or (step is not None and step not in steps):
      raise FileNotFoundError(
        f"checkpoint: no step {step or ''} in {self.directory}: there are {steps}."
      )
    step = steps[-1] if step is None else step
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    saved = self._manager.item_metadata(step).state
    target = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one),
      dict(saved.tree),
      is_leaf=lambda leaf: hasattr(leaf, "shape"),
    )
    return jax.tree.map(np.asarray, _verified(self._read(step, target), target)[0])

  def _read(self, step, target):
    return self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(_nest(tree.flatten(target))),
        meta=ocp.args.JsonRestore(),
      ),
    )

  def _check(self, step, target):
    """Raises _OtherModelError if shapes or paths differ from what was saved."""
    saved = self._manager.item_metadata(step).state
    saved = {
      path: tuple(leaf.shape)
      for path, leaf in tree.flatten(
        jax.tree.map(_Shape, dict(saved.tree), is_leaf=lambda x: hasattr(x, "shape"))
      ).items()
    }
    wanted = {path: tuple(leaf.shape) for path, leaf in tree.flatten(target).items()}
    lines = [
      f"  only in the checkpoint: {p} {saved[p]}" for p in saved if p not in wanted
    ]
    lines += [
      f"  only in this config: {p} {wanted[p]}" for p in wanted if p not in saved
    ]
    lines += [
      f"  {p}: {saved[p]} in the checkpoint, {wanted[p]} in this config"
      for p in wanted
      if p in saved and saved[p] != wanted[p]
    ]
    if lines:
      more = [f"  … and {len(lines) - 12} more"] if len(lines) > 12 else []
      raise _OtherModelError(
        f"checkpoint: {self.directory / str(step)} is of another model than this"
        " config: take another workdir, or the config.json beside the checkpoint.\n"
        + "\n".join(lines[:12] + more)
      )


def _verified(got, target):
  """(state, meta) of what was read, the state in the target's structure.

  Raises:
    OSError: it is not what was saved.
  """
  meta, saved = seal.opened(got.meta)
  leaves = tree.flatten(got.state)
  found = seal.fingerprints(leaves)
  wrong = [path for path in found if found[path] != saved.get(path)]
  if wrong:
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    raise OSError(f"{wrong[0]}{more}: not the bits that were saved")
  ordered = [leaves[path] for path in tree.flatten(target)]
  return jax.tree.unflatten(jax.tree.structure(target), ordered), meta


def _meeting():
  """What orbax's thread waits by, which says when this process has written its part."""
  meet = ocp.multihost.get_barrier_sync_fn()

  def wait(*, key, timeout_ms):
    if "async_write_complete" in key:
      course.written()
    meet(key=key, timeout_ms=timeout_ms)

  return wait


def _all_processes(fine: bool) -> bool:
  """Whether it is true in all processes; every one of them has to ask."""
  if jax.process_count() == 1:
    return fine
  return bool(multihost_utils.process_allgather(np.int32(fine)).all())


def _line(error):
  """The first line of an error, or its kind."""
  return (str(error) or type(error).__name__).splitlines()[0]


class _OtherModelError(ValueError):
  pass


class _Shape:
  """A leaf that is no tree, whatever its metadata is made of."""

  def __init__(self, metadata):
    self.shape = metadata.shape


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  """{"a/b": x} -> {"a": {"b": x}}: the same text keys for tuples, structs and dicts."""
  nested = {}
  for path, leaf in flat.items():
    *parents, last = path.split("/")
    inner = nested
    for name in parents:
      inner = inner.setdefault(name, {})
    inner[last] = leaf
  return nested
