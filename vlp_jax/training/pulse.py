"""Which processes live and go on, by what they say of themselves now and then.

A process that is stopped, or whose machine stands still, says nothing. One whose data
do not come, or whose disk does not answer, lives, but does not go on, and the others
wait for it: it is behind.
"""

from collections.abc import Iterable
import dataclasses
import time

from vlp_jax.training import course


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


@dataclasses.dataclass(frozen=True)
class Stillness:
  """That nobody goes on.

  Attributes:
    last: the process that has come least far, or the first of those that have; it is
      the one that others wait for. seconds: since one has gone on.
    doing: of each that has not come to its end.
  """

  last: int
  seconds: float
  doing: dict[int, course.Doing]

  def __str__(self) -> str:
    """What the last one does, as what follows "it is waited for:", and the others."""
    mine = self.doing[self.last]
    words = f"nobody has gone on for {self.seconds:.0f} s; for {mine.seconds:.0f} s"
    words += f" it {mine}"
    others = {}
    for index, doing in sorted(self.doing.items()):
      if index != self.last:
        others.setdefault(str(doing), []).append(index)
    if others:
      words += ", " + ", ".join(f"{_named(who)} {what}" for what, who in others.items())
    ranks = {_rank(doing) for doing in self.doing.values()}
    if others and len(ranks) == 1:
      return f"{words}: is it the devices, the network, or the disk?"
    return f"{words}: {ASKED.get(mine.verb, 'what keeps it')}?"


# Of who is waited for.
ASKED = {
  "trains": "do its data come",
  "evaluates": "do its data come",
  "reads": "does its disk or its store answer",
  "saves": "does its disk or its store answer",
}


class Turns:
  """What each process does, and since when none has gone on."""

  def __init__(self, count: int, limit: float):
    """Args: number of processes; seconds in which one goes on, 0: as long as they
    like."""
    self._limit = limit
    self._of: dict[int, course.Doing | None] = dict.fromkeys(range(count))
    self._told: dict[int, float] = {}
    self._moved = time.monotonic()

  def tell(self, index: int, doing: course.Doing) -> None:
    before, self._of[index] = self._of[index], doing
    self._told[index] = time.monotonic()
    if before is None or before.place != doing.place or not doing.limited:
      self._moved = time.monotonic()

  def forget(self, index: int) -> None:
    """Of one that has come to its end: it waits for the others."""
    if index in self._of:
      del self._of[index]
      self._moved = time.monotonic()

  def begin_anew(self) -> None:
    """Nobody has stood still so far."""
    self._moved = time.monotonic()

  def stand_still(self) -> Stillness | None:
    """Where all may be said to hang, and none has gone on."""
    seconds = time.monotonic() - self._moved
    doing = self._of
    if not self._limit or seconds <= self._limit or not doing:
      return None
    if any(each is None or not each.limited for each in doing.values()):
      return None
    last = min(doing, key=lambda index: (_rank(doing[index]), index))
    now = time.monotonic()
    doing = {
      index: dataclasses.replace(each, seconds=each.seconds + now - self._told[index])
      for index, each in doing.items()
    }
    return Stillness(last, seconds, doing)


def _rank(doing):
  """How far it has come: who waits for others has come further than they."""
  return doing.moves, doing.waits, not doing.writes


def _named(indices):
  """Such as "processes 0, 1, 2, 4 and 8 more:"."""
  if len(indices) == 1:
    return f"process {indices[0]}"
  more = f" and {len(indices) - 4} more" if len(indices) > 4 else ""
  return f"processes {', '.join(map(str, indices[:4]))}{more}:"
