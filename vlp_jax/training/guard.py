"""What becomes of a step whose gradient is not finite, or whose loss leaps up.

The step itself decides, on the device, whether its update is taken: nobody waits for
it. The loop finds out when it next looks at the metrics, and stops, goes on, or goes
back. What is compared with lies in the train state, so a resumed run decides alike.
"""

from collections.abc import Callable, Mapping
import dataclasses
import logging
import math
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp

from vlp_jax.ops import reduce

_log = logging.getLogger(__name__)

NONFINITE, SPIKES, LAST = "guard/nonfinite", "guard/spikes", "guard/last"
TINY = 1e-30  # of gradient norms, whose logarithm is taken


@dataclasses.dataclass(frozen=True)
class Guard:
  """Fields of `config.guard`.

  "stop" ends the run, and keeps the last good checkpoint. "skip" leaves that update
  out: parameters, optimiser, teacher and queues stay as they were. "roll_back" goes
  back to the last checkpoint, and on with the data after the bad batch (as PaLM's
  authors did by hand: arXiv:2204.02311, section 5.1).

  Attributes:
    nonfinite: what is done where the loss or the norm of the gradient is no number.
    spike: what is done where one of them is far above its running mean; None: nobody
      looks.
    loss_sigmas: above its mean the loss may be by so many standard deviations; None:
      by any.
    norm_factor: of its (geometric) mean the norm may be so many times; None: any.
    window: steps that the running means look back; nothing is a spike before so many.
    most: steps that are skipped, or times that the run goes back, over its whole
      length; at one more it stops.
  """

  nonfinite: Literal["stop", "skip", "roll_back"] = "stop"
  spike: Literal["stop", "skip", "roll_back"] | None = None
  loss_sigmas: float | None = 6.0
  norm_factor: float | None = 10.0
  window: int = 100
  most: int = 10

  def __post_init__(self):
    for field, low in (("window", 2), ("most", 1)):
      if getattr(self, field) < low:
        raise ValueError(
          f"config: guard.{field}={getattr(self, field)}: wants {low} or more."
        )
    for field, low in (("loss_sigmas", 0), ("norm_factor", 1)):
      value = getattr(self, field)
      if value is not None and not low < value < math.inf:
        raise ValueError(
          f"config: guard.{field}={value}: wants more than {low}, or None."
        )
    if self.spike and self.loss_sigmas is None and self.norm_factor is None:
      raise ValueError(
        f"config: guard.spike={self.spike!r} wants guard.loss_sigmas or"
        " guard.norm_factor: both are None."
      )

  @property
  def decides(self) -> bool:
    """Whether steps have to decide about their updates; else they are as they were."""
    return self.spike is not None or self.nonfinite != "stop"

  @property
  def rolls_back(self) -> bool:
    return "roll_back" in (self.nonfinite, self.spike)


@flax.struct.dataclass
class Record:
  """What steps are compared with, and what was found; scalars of the train state.

  nonfinite, spikes: int32, steps so far; last: int32, the newest of them, counted from
  1. seen: int32, steps in the means; loss, variance, log_norm: float32.
  """

  nonfinite: jax.Array
  spikes: jax.Array
  last: jax.Array
  seen: jax.Array
  loss: jax.Array
  variance: jax.Array
  log_norm: jax.Array


def fresh() -> Record:
  """Of a run that has not begun. Each scalar is its own: the step donates them."""
  whole = [jnp.zeros((), jnp.int32) for _ in range(4)]
  return Record(*whole, *(jnp.zeros((), jnp.float32) for _ in range(3)))


def judge(
  guard: Guard, record: Record, loss: jax.Array, norm: jax.Array, step: jax.Array
) -> tuple[jax.Array, Record]:
  """(bool [] whether the update is taken, the record after it).

  Means are exponential, over the steps that were taken: plain ones at first, until
  there are `window` of them.

  Args:
    loss, norm: float32 [], of this step. step: int32 [], counted from 1.
  """
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  log_norm = jnp.log(jnp.maximum(norm, TINY))
  leaps = jnp.bool_(False)
  if guard.spike:
    if guard.loss_sigmas is not None:
      bound = guard.loss_sigmas * jnp.sqrt(record.variance)
      leaps |= loss - record.loss > bound
    if guard.norm_factor is not None:
      leaps |= log_norm - record.log_norm > math.log(guard.norm_factor)
    leaps &= finite & (record.seen >= guard.window)
  taken = finite & ~leaps
  rate = jnp.maximum(1.0 / (record.seen + 1), 1.0 / guard.window)
  # West, "Updating mean and variance estimates", CACM 22(9), 1979, its means weighted.
  off = loss - record.loss
  moved = record.replace(
    seen=record.seen + 1,
    loss=record.loss + rate * off,
    variance=(1.0 - rate) * (record.variance + rate * off * off),
    log_norm=record.log_norm + rate * (log_norm - record.log_norm),
  )
  left = record.replace(
    nonfinite=record.nonfinite + ~finite, spikes=record.spikes + leaps, last=step
  )
  return taken, jax.tree.map(lambda a, b: jnp.where(taken, a, b), moved, left)


def guarded(
  step: Callable, guard: Guard, *, schedule: Callable[[jax.Array], jax.Array]
) -> Callable:
  """The step of `training/step.py`, whose update is taken only if `judge` says so.

  It costs one copy of the teacher, whose old values are wanted until the end of the
  step. The learning rate counts updates: one that is left out does not move it.
  """
  if not guard.decides:
    return step

  def decide(state, batch):
    new, metrics = step(state, batch)
    loss, norm = metrics["loss"].value(), metrics["grad_norm"].value()
    taken, record = judge(guard, state.guard, loss, norm, new.step)
    keep = lambda new, old: jnp.where(taken, new, old)
    fields = ("params", "opt_state", "ema", "memory")
    kept = {f: jax.tree.map(keep, getattr(new, f), getattr(state, f)) for f in fields}
    left_out = state.guard.nonfinite + state.guard.spikes
    one = lambda value: reduce.Mean(jnp.float32(value), jnp.float32(1.0))
    metrics = metrics | {
      "learning_rate": one(schedule(state.step - left_out)),
      NONFINITE: one(record.nonfinite),
      SPIKES: one(record.spikes),
      LAST: one(record.last),
    }
    return new.replace(guard=record, **kept), metrics

  return decide


# --- What the loop does about it ---


class Watch:
  """Looks at the metrics of a run, and says when it has to go back.

  Attributes:
    rolled_back: how often it has.
  """

  def __init__(self, guard: Guard, record: Record, *, rolled_back: int = 0):
    """record: of the state that the run goes on from."""
    self._guard = guard
    self.rolled_back = rolled_back
    self.goes_on_from(record)

  def goes_on_from(self, record: Record) -> None:
    """The state is another one now."""
    self._nonfinite, self._spikes = int(record.nonfinite), int(record.spikes)

  def look(
    self, values: Mapping[str, float], step: int, kept: Callable[[], str]
  ) -> int | None:
    """The last bad step before `step`, if the run has to go back for it; else None.

    Args:
      values: metrics of `step`.
      kept: says in words which checkpoint there is, for messages.

    Raises:
      FloatingPointError: the run has to stop.
    """
    guard, last = self._guard, int(values.get(LAST, 0))
    wrong = [key for key, value in values.items() if not math.isfinite(value)]
    if wrong and last != step:
      raise FloatingPointError(
        f"step {step}: not finite: {', '.join(wrong)}. {kept()}{_WAY_OUT}"
      )
    counts = [int(values.get(key, 0)) for key in (NONFINITE, SPIKES)]
    fresh = (counts[0] - self._nonfinite, counts[1] - self._spikes)
    self._nonfinite, self._spikes = counts
    found = []
    for count, policy, what in (
      (fresh[0], guard.nonfinite, "the loss or its gradient is not finite"),
      (fresh[1], guard.spike, "the loss or its gradient leaps up"),
    ):
      if count:
        found.append(policy)
        said = (
          f"{count} steps, the last of them {last}" if count > 1 else f"step {last}"
        )
        _log.warning("%s: %s.", said, what)
    if not found:
      return None
    if "stop" in found:
      raise FloatingPointError(
        f"step {last}: bad, and the guard's policy is to stop. {kept()}{_WAY_OUT}"
      )
    if "roll_back" in found:
      self.rolled_back += 1
      self._bound(self.rolled_back, "times back", last, kept)
      return last
    self._bound(sum(counts), "updates left out", last, kept)
    return None

  def _bound(self, count, what, step, kept):
    most = self._guard.most
    if count > most:
      raise FloatingPointError(
        f"step {step}: {count} {what}, and guard.most={most}. {kept()}{_WAY_OUT}"
      )
    _log.warning("%d %s of at most %d.", count, what, most)


_WAY_OUT = " Lower optim.lr, set optim.clip_norm, or lengthen optim.warmup."


def floats(metrics: Mapping[str, Any]) -> dict[str, float]:
  """The values of a step's metrics: here the host waits for the device.

  Of those that counted anything: an objective that was not drawn says nothing.
  """
  return reduce.counted(metrics)
