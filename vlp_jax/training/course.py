"""What this process does, and how far it has come: for those who wait for it.

All processes of a run do the same in the same order, so that a count of what each has
done says who has come less far. The watch's thread reads what the main thread writes.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import os
import sys
import threading
import time
from types import FrameType

# Of JAX and of orbax: where the main thread is in one of these, it waits for others.
MEETING = ("multihost_utils.py", "multihost.py")
FRAMES = 12  # of a stack; what is further out is known


@dataclasses.dataclass(frozen=True)
class Doing:
  """What a process is at.

  Attributes:
    verb: "starts", "trains", "saves", "evaluates", …. of: what, "step 40"; or "".
    seconds: since when.
    limited: whether it may be said to hang; not while it compiles.
    batches: got in it; or pieces of them, where those are gone through one by one.
    moves: how often it has gone on since it started, the same count in all processes.
    waits: whether its main thread waits for other processes.
    writes: what it still writes beside, while others wait for it; or "".
  """

  verb: str
  of: str = ""
  seconds: float = 0.0
  limited: bool = True
  batches: int = 0
  moves: int = 0
  waits: bool = False
  writes: str = ""

  @property
  def place(self) -> tuple[str, str, int, str]:
    """Changes when it goes on."""
    return self.verb, self.of, self.moves, self.writes

  def __str__(self) -> str:
    """As what follows "it"; without `seconds`, which differ between processes."""
    got = f" ({self.batches} batches so far)" if self.batches else ""
    words = f"{self.verb} {self.of}".strip() + got
    if self.writes and self.writes != self.of:
      words += f" and has not written its part of {self.writes}"
    return words + (" and waits for others" if self.waits else "")


START = Doing("starts", limited=False)


class Course:
  """Of one process. Another thread may ask what it does `now`."""

  def __init__(self):
    # Replaced and never changed, by the main thread alone.
    self._doing, self._begun = START, time.monotonic()
    self._writes = ""

  def now(self) -> Doing:
    return dataclasses.replace(
      self._doing,
      seconds=time.monotonic() - self._begun,
      waits=any(os.path.basename(f.f_code.co_filename) in MEETING for f in _stack()),
      writes=self._writes,
    )

  @contextlib.contextmanager
  def at(self, verb: str, of: str = "", *, limited: bool = True) -> Iterator[None]:
    """While it lasts, it does this; then again what it did before."""
    before, begun = self._doing, self._begun
    self.turn_to(verb, of, limited=limited)
    try:
      yield
    finally:
      self._doing = dataclasses.replace(before, moves=self._doing.moves + 1)
      self._begun = begun

  def turn_to(self, verb: str, of: str = "", *, limited: bool = True) -> None:
    """From now on it does this, until the end of what it does it within."""
    self._begun = time.monotonic()
    moves = self._doing.moves + 1
    self._doing = Doing(verb, of, limited=limited, moves=moves)

  def go_on(self) -> None:
    """It has got another batch, or something as large done."""
    doing = self._doing
    self._doing = dataclasses.replace(
      doing, batches=doing.batches + 1, moves=doing.moves + 1
    )

  def writes(self, of: str) -> None:
    """It begins to write this beside what it does."""
    self._writes = of

  def written(self) -> None:
    """Its part is on the disk, or given up. Any thread may say it."""
    self._writes = ""


def stands() -> list[str]:
  """Where the main thread is, the innermost last: "file:line function"."""
  # Without the lines themselves: the disk that has them may be what hangs.
  found = [
    f"{f.f_code.co_filename}:{f.f_lineno} {f.f_code.co_qualname}" for f in _stack()
  ]
  return found[:FRAMES][::-1]


def _stack() -> Iterator[FrameType]:
  """Frames of the main thread, the innermost first."""
  frame = sys._current_frames().get(threading.main_thread().ident)
  while frame is not None:
    yield frame
    frame = frame.f_back


# Of this process.
_mine = Course()
now: Callable[[], Doing] = _mine.now
at = _mine.at
turn_to, go_on = _mine.turn_to, _mine.go_on
writes, written = _mine.writes, _mine.written
