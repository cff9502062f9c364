"""A signal to stop becomes a flag that the loop looks at, so that it can save first."""

import contextlib
import signal
from types import FrameType


class Stop(contextlib.AbstractContextManager):
  """`with Stop() as stop:` … `if stop.asked: save and leave`.

  The first SIGTERM or SIGINT sets `asked`; a second one, of either kind, acts as
  without us. Handlers are put back at the end.
  """

  SIGNALS = (signal.SIGTERM, signal.SIGINT)

  def __init__(self):
    self.asked: str | None = None
    self._before = {}

  def __enter__(self) -> "Stop":
    self._before = {s: signal.signal(s, self._handle) for s in self.SIGNALS}
    return self

  def __exit__(self, *exception) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _handle(self, number: int, frame: FrameType | None) -> None:
    self.asked = signal.Signals(number).name
    self.__exit__()
