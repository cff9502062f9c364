"""Checkpoints: state and data position in one, written in the background, whole or not.

Orbax writes to a temporary folder and renames it when all is there, so a process that
dies while it saves leaves the checkpoints before it untouched.
"""

from collections.abc import Mapping
import logging
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from vlp_jax.ops import tree

_TEMPORARY = "*.orbax-checkpoint-tmp*"
_log = logging.getLogger(__name__)


class CheckpointError(OSError):
  """The run ended, and its last state is not on the disk."""


class Checkpoints:
  """The checkpoints of one run.

  Attributes:
    directory: one folder a step.
  """

  def __init__(
    self, directory: pathlib.Path, *, keep: int = 2, best: str | None = None
  ):
    """Opens the folder, makes it, and removes what an interrupted save left.

    Args:
      directory: of this run alone.
      keep: so many of the newest are kept.
      best: metric whose largest value's checkpoint is kept as well.
    """
    self.directory = pathlib.Path(directory).resolve()
    self._keep, self._best = keep, best
    self._failure = None
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

  def best_step(self) -> int | None:
    """The step whose metric `best` is largest; None without one."""
    return self._manager.best_step() if self._best else None

  def save(
    self,
    step: int,
    state: Any,
    meta: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Starts to save, and returns when the state may be overwritten.

    A save that fails is told in the log, and what is left of it removed; the
    checkpoints before it stay, and the next call tries again.

    Args:
      step: of the run. state: any tree of arrays. meta: JSON.
      metrics: of this step; needs `best` among them for it to count as one.
    """
    self.wait()
    if self._best and self._best not in (metrics or {}):
      metrics = None
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(_nest(tree.flatten(state))),
          meta=ocp.args.JsonSave(dict(meta)),
        ),
        metrics=dict(metrics) if metrics and self._best else None,
      )
      self._pending = step
      self._failure = None
    except Exception as error:  # orbax wraps the system's errors in its own kinds
      self._fail(step, error)

  _pending: int | None = None

  def wait(self) -> None:
    """Until the save that was started is on the disk, or has failed."""
    if self._pending is None:
      return
    step, self._pending = self._pending, None
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      self._fail(step, error)

  def _fail(self, step, error):
    cause = error
    while cause.__cause__ is not None and not isinstance(cause, OSError):
      cause = cause.__cause__
    self._failure = (step, cause)
    for part in self.directory.glob(_TEMPORARY):
      shutil.rmtree(part, ignore_errors=True)
    try:
      self._manager.close()
    except Exception as again:  # the failed save, told a second time
      _log.debug("closing the failed manager: %s", again)
    self._manager = self._open()
    _log.error(
      "checkpoint: step %d could not be saved in %s: %s. Training goes on and saves"
      " again later; the last whole checkpoint is %s.",
      step,
      self.directory,
      str(cause).splitlines()[0] if str(cause) else type(cause).__name__,
      f"step {self.steps()[-1]}" if self.steps() else "not there: none was saved yet",
    )

  def finish(self) -> None:
    """Waits for the last save.

    Raises:
      CheckpointError: it failed.
    """
    self.wait()
    failure = self._failure
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

    A checkpoint that cannot be read is passed over with a warning for the one before.

    Args:
      target: tree of ShapeDtypeStructs with shardings, as the state's.
      step: that one and no other.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is of another model; lists the paths that differ.
      OSError: it is damaged, and there is none before it or `step` names it.
    """
    steps = self.steps()
    if not steps or (step is not None and step not in steps):
      there = f"there are steps {steps}" if steps else "there is none"
      wanted = "" if step is None else f" of step {step}"
      raise FileNotFoundError(f"checkpoint: none{wanted} in {self.directory}: {there}.")
    for candidate in [step] if step is not None else steps[::-1]:
      try:
        self._check(candidate, target)
        return self._restore(candidate, target)
      except Exception as error:
        before = [s for s in steps if s < candidate]
        if isinstance(error, _OtherModelError):
          raise
        if step is not None or not before:
          others = [s for s in steps if s != candidate]
          raise OSError(
            f"checkpoint: {self.directory / str(candidate)} is damaged"
            f" ({(str(error) or repr(error)).splitlines()[0]}); whole ones may be the"
            f" others that are there: {others or 'none'}."
          ) from error
        _log.warning(
          "checkpoint: %s is damaged (%s): using step %d, the one before it.",
          self.directory / str(candidate),
          str(error).splitlines()[0],
          before[-1],
        )
    raise AssertionError("unreachable: the loop returns or raises")

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
    return jax.tree.map(np.asarray, self._restore(step, target)[0])

  def _restore(self, step, target):
    flat = tree.flatten(target)
    got = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(_nest(flat)), meta=ocp.args.JsonRestore()
      ),
    )
    leaves = tree.flatten(got.state)
    structure = jax.tree.structure(target)
    return jax.tree.unflatten(structure, [leaves[path] for path in flat]), got.meta

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
