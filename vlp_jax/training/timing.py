"""How a run is getting on: the progress line, the share of waiting, the profiler."""

from collections.abc import Iterable, Iterator
import contextlib
import logging
import sys
import time
from typing import Any, TextIO

import jax

from vlp_jax.training import course

_log = logging.getLogger(__name__)


class Waiting:
  """Iterates, and measures the time that the consumer waits for the next item.

  With each, this process goes on in its course.

  Attributes:
    seconds: waited.
  """

  def __init__(self, items: Iterable[Any]):
    self._items = iter(items)
    self.seconds = 0.0

  def go_on_with(self, items: Iterable[Any]) -> None:
    """Others come from now on."""
    self._items = iter(items)

  def __iter__(self) -> Iterator[Any]:
    return self

  def __next__(self) -> Any:
    start = time.perf_counter()
    try:
      item = next(self._items)
    finally:
      self.seconds += time.perf_counter() - start
    course.go_on()
    return item


class Progress:
  """Tells step, loss, examples a second, waiting and time left.

  On a terminal it is one line that is drawn anew, elsewhere a log line now and then.
  """

  def __init__(
    self,
    *,
    start: int,
    total: int,
    batch_size: int,
    waiting: Waiting,
    stream: TextIO | None = None,
    quiet: bool = False,
  ):
    self._total, self._batch_size, self._waiting = total, batch_size, waiting
    self._stream, self._quiet = stream or sys.stderr, quiet
    self._bar = self._stream.isatty()
    self._paused = 0.0
    self._last_line = 0.0
    self._mark = (start, time.perf_counter(), waiting.seconds)

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Time that is no training: evaluating, saving."""
    start = time.perf_counter()
    try:
      yield
    finally:
      self._paused += time.perf_counter() - start

  def count_from(self, step: int) -> None:
    """Rates are of the steps after this one, which compiled or was gone back to."""
    self._mark = (step, time.perf_counter(), self._waiting.seconds)
    self._paused = 0.0

  def rates(self, step: int) -> dict[str, float]:
    """Since the call before: examples a second, and the share of waiting (0 … 1)."""
    now = time.perf_counter()
    mark_step, mark_time, mark_waited = self._mark
    spent = max(now - mark_time - self._paused, 1e-9)
    waited = self._waiting.seconds - mark_waited
    self._mark = (step, now, self._waiting.seconds)
    self._paused = 0.0
    return {
      "examples_per_second": (step - mark_step) * self._batch_size / spent,
      "input_wait": min(1.0, waited / spent),
    }

  def show(self, step: int, loss: float, rates: dict[str, float]) -> None:
    """Draws the line; off a terminal at most every ten seconds, and at the end."""
    if self._quiet:
      return
    rate = rates["examples_per_second"] / self._batch_size
    left = _clock((self._total - step) / rate) if rate else "not known yet"
    words = (
      f"step {step}/{self._total}  loss {loss:.3f}"
      f"  {rates['examples_per_second']:.0f} examples/s"
      f"  waiting {100 * rates['input_wait']:.0f} %  left {left}"
    )
    if self._bar:
      done = round(20 * step / self._total)
      self._stream.write(f"\r[{'#' * done}{'.' * (20 - done)}] {words}\x1b[K")
    elif time.perf_counter() - self._last_line > 10 or step == self._total:
      self._last_line = time.perf_counter()
      self._stream.write(words + "\n")
    self._stream.flush()

  def close(self) -> None:
    """Leaves the line."""
    if self._bar and not self._quiet:
      self._stream.write("\n")


def _clock(seconds):
  seconds = round(seconds)
  hours, seconds = divmod(seconds, 3600)
  minutes, seconds = divmod(seconds, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Profiler:
  """Records steps start … start + steps - 1 of a run with `jax.profiler`."""

  def __init__(self, directory: str, *, start: int, steps: int):
    self._directory, self._first, self._last = directory, start, start + steps
    self._on = False

  def before(self, step: int) -> None:
    """To be called before every step."""
    if step == self._first:
      jax.profiler.start_trace(self._directory)
      self._on = True
    elif self._on and step >= self._last:
      self.stop()

  def stop(self) -> None:
    if self._on:
      jax.profiler.stop_trace()
      self._on = False
      _log.info("profile: written to %s; open it with TensorBoard.", self._directory)
