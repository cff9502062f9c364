"""A notice to stop becomes a flag that the loop looks at, so that it can save first.

A notice is a signal, or what Google's metadata server says. With several processes it
comes to one of them, or to each at another step: they agree on the step.
"""

from collections.abc import Mapping
import contextlib
import dataclasses
import itertools
import logging
import os
import signal
import threading
import time
from types import FrameType
from typing import Any, Literal
import urllib.error
import urllib.request

import jax

_log = logging.getLogger(__name__)

POLL = 0.5  # seconds between looks at what other processes say
ANSWER = 60.0  # seconds in which all of them have to answer
MAINTENANCE_POLL = 5.0
# Answers of the metadata server after which this machine is gone.
# https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice
# https://cloud.google.com/compute/docs/instances/create-use-spot
NOTICES = {
  "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE",
  "preempted": "TRUE",
}
_UNCATCHABLE = ("SIGKILL", "SIGSTOP")


@dataclasses.dataclass(frozen=True)
class Preemption:
  """Fields of `config.preemption`.

  Attributes:
    signals: names of those after which the run saves and leaves. SIGUSR1 is what
      SLURM's `--signal=USR1@120` sends 120 seconds before it takes the machine away.
    maintenance: "gce" asks the metadata server of a machine of Google Cloud, every
      five seconds, whether it is about to end; None: nobody is asked. The server is
      GCE_METADATA_HOST of the environment, where that is set.
  """

  signals: tuple[str, ...] = ("SIGTERM", "SIGINT", "SIGUSR1")
  maintenance: Literal["gce"] | None = None

  def __post_init__(self):
    for name in self.signals:
      if name not in signal.Signals.__members__ or name in _UNCATCHABLE:
        raise ValueError(
          f"config: preemption.signals: {name!r} is no signal that can be caught:"
          " write names such as 'SIGTERM', 'SIGUSR1', 'SIGUSR2'."
        )


class Stop(contextlib.AbstractContextManager):
  """`with Stop() as stop:` … once a step: `if stop.reached(): save and leave`.

  The first signal asks; a second one, of any of the kinds, acts as without us. Handlers
  are put back at the end.

  Looking costs nothing. With several processes a thread of each looks twice a second
  at the notes of `jax.distributed`'s coordinator; once there is a notice, all say how
  many steps they have begun, and stop after the next of the one that has most.

  Attributes:
    asked: name of the signal, perhaps with where it came from; None: nobody asked, or
      not all know it yet.
  """

  def __init__(self, preemption: Preemption = Preemption()):
    self._signals = [signal.Signals[name] for name in preemption.signals]
    self._maintenance = preemption.maintenance
    self.asked: str | None = None
    self._noticed: str | None = None
    self._before: dict[int, Any] = {}
    self._over = threading.Event()
    self._threads: list[threading.Thread] = []
    self._board = None
    # Of the agreement: held while it is made, so that nobody begins another step.
    self._lock = threading.Lock()
    self._calls = 0
    self._last_call: int | None = None

  def __enter__(self) -> "Stop":
    self._before = {s: signal.signal(s, self._handle) for s in self._signals}
    if jax.process_count() > 1:
      self._board = Board()
      self._start(self._agree)
    if self._maintenance:
      self._start(self._ask_gce)
    return self

  def _start(self, run):
    thread = threading.Thread(target=run, name=f"preemption{run.__name__}", daemon=True)
    thread.start()
    self._threads.append(thread)

  def __exit__(self, *exception) -> None:
    self._put_back()
    self._over.set()
    for thread in self._threads:
      thread.join(timeout=10.0)

  def _put_back(self):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _handle(self, number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    # Not by way of a stream that the program may be in the middle of writing to.
    os.write(2, f"\n{name}: saves after this step and ends; again: at once\n".encode())
    self._notice(name)
    self._put_back()

  def _notice(self, name):
    self._noticed = self._noticed or name
    if self._board is None:
      self.asked = self._noticed

  def reached(self) -> bool:
    """Whether the step that has just begun is the last one; every process agrees.

    To be called once a step, by all processes.
    """
    with self._lock:
      self._calls += 1
      if self._board is None:
        return self.asked is not None
      return self._last_call is not None and self._calls >= self._last_call

  @property
  def code(self) -> int:
    """Exit code: 128 and the number of the signal."""
    return 128 + signal.Signals[(self.asked or "SIGTERM").split()[0]]

  # --- Among several processes ---

  def _agree(self):
    try:
      while not self._over.wait(POLL):
        if self._noticed:
          self._board.put("why", self._noticed)
        why = self._board.read("why")
        if why:
          self._settle(why)
          return
    except Exception as error:  # the coordinator is gone: the run ends by that
      _log.debug("preemption: %s", error)

  def _settle(self, why):
    """Finds the step at which all stop; holds this process before its next one."""
    with self._lock:
      self._board.put("calls", str(self._calls))
      end = time.monotonic() + ANSWER
      while len(calls := self._board.read("calls")) < jax.process_count():
        if self._over.wait(0.05):
          return
        if time.monotonic() > end:
          silent = sorted(set(range(jax.process_count())) - set(calls))
          _log.error(
            "preemption: asked to stop (%s), but processes %s do not answer: this"
            " one goes on.",
            _said(why),
            silent,
          )
          return
      # Whoever has begun most steps has not looked since: it may begin one more.
      self._last_call = max(map(int, calls.values())) + 1
      self.asked = _said(why)

  # --- Google's metadata server ---

  def _ask_gce(self):
    failed = False
    while not self._noticed:
      try:
        for name, gone in NOTICES.items():
          if gce(name) == gone:
            self._notice(f"SIGTERM ({name}: {gone})")
      except (OSError, ValueError) as error:
        if not failed:
          _log.warning("preemption: no answer of the metadata server: %s.", error)
        failed = True
      if self._over.wait(MAINTENANCE_POLL):
        return


def gce(name: str, *, timeout: float = 2.0) -> str:
  """What the metadata server of this machine says of itself."""
  host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
  url = f"http://{host}/computeMetadata/v1/instance/{name}"
  request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
  with urllib.request.urlopen(request, timeout=timeout) as answer:
    return answer.read().decode("utf-8", "replace").strip()


def _said(why):
  index, name = min(why.items())
  return name if len(why) > 1 else f"{name} (process {index})"


_boards = itertools.count()


class Board:
  """Notes that all processes of `jax.distributed` read; one a process and name."""

  def __init__(self):
    # Not public, but the only way to its key-value store; orbax takes it as well.
    from jax._src import distributed

    self._client = distributed.global_state.client
    if self._client is None:
      raise RuntimeError("jax.distributed is not initialized.")
    # Every process makes as many of them, in the same order.
    self._prefix = f"vlp_jax/preemption/{next(_boards)}"

  def put(self, name: str, text: str) -> None:
    key = f"{self._prefix}/{name}/{jax.process_index()}"
    self._client.key_value_set(key, text, allow_overwrite=True)

  def read(self, name: str) -> Mapping[int, str]:
    """{process: its note}."""
    found = self._client.key_value_dir_get(f"{self._prefix}/{name}/")
    return {int(key.rpartition("/")[2]): text for key, text in found}
