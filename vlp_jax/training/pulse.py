"""Which processes live and go on, by what they say of themselves now and then.

A process that is stopped, or whose machine stands still, says nothing. One whose data
do not come lives, but takes no step, and the others wait for it: it is behind.
"""

from collections.abc import Iterable
import time


class Pulse:
  """Whose turn it is to give a sign of life, and who has given none for too long.

  Attributes:
    every: seconds between two signs; None: none are given.
  """

  def __init__(self, others: Iterable[int], limit: float):
    """Args: the processes that are heard; seconds of silence, 0: as long as they
    like."""
    self.every = limit / 4 or None
    self._limit = limit
    self._woke = self._said = time.monotonic()
    self._heard = dict.fromkeys(others, self._woke)

  def hear(self, index: int) -> None:
    self._heard[index] = time.monotonic()

  def forget(self, index: int) -> None:
    """Of one that has come to its end, and may be as silent as it likes."""
    del self._heard[index]

  def speak(self) -> bool:
    """Whether it is time for a sign; to be called about `every` seconds."""
    now = time.monotonic()
    if self.every is None or now - self._said < self.every:
      return False
    self._said = now
    return True

  def overslept(self) -> bool:
    """Whether it was this process that hung, and heard nobody: the others begin anew.

    To be called about `every` seconds, before `silent`.
    """
    now = time.monotonic()
    slept = self.every is not None and now - self._woke > 2 * self.every
    if slept:
      self._heard = dict.fromkeys(self._heard, now)
    self._woke = now
    return slept

  def silent(self) -> tuple[int, float] | None:
    """(process, seconds) of one that hangs."""
    now = time.monotonic()
    for index, then in self._heard.items():
      if self.every is not None and now - then > self._limit:
        return index, now - then
    return None


class Turns:
  """How many batches each process has got, and since when none has got another."""

  def __init__(self, count: int, limit: float):
    """Args: number of processes; seconds without a step, 0: as long as they like."""
    self._limit = limit
    self._of = dict.fromkeys(range(count))
    self._moved = time.monotonic()

  def tell(self, index: int, turn: int | None) -> None:
    """turn: None while a process is not at it: it starts, saves or evaluates."""
    if turn is None or turn != self._of[index]:
      self._of[index], self._moved = turn, time.monotonic()

  def begin_anew(self) -> None:
    """Nobody has stood still so far."""
    self._moved = time.monotonic()

  def stand_still(self) -> tuple[dict[int, int], float] | None:
    """({process: batches}, seconds) where all are at it, and none has gone on."""
    seconds = time.monotonic() - self._moved
    if not self._limit or seconds <= self._limit or None in self._of.values():
      return None
    return dict(self._of), seconds
