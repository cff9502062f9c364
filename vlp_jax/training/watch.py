"""Processes that notice at once when one of their run is gone, and soon if it hangs.

Each holds a connection to process 0. The kernel closes those of a process that dies, so
nobody has to poll, and its keepalive finds a machine that is lost. A process that hangs
(stopped, out of memory, its machine's disk gone) is one that says nothing any more: all
say now and then that they are alive, what they do and how far they have come: where
none goes on (a file system does not answer), the one that is behind is waited for.
Process 0 passes on what it learns. JAX's own service says, 100 s later and without a
name, that "another task died".

What is sent: lines of JSON. Both ways: {"alive"}, with "doing". Process i to 0:
{"done"} or {"failed"}; 0 to i: {"lost"} or {"end"}.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import json
import selectors
import socket
import threading
import time

from vlp_jax.training import course
from vlp_jax.training import pulse as pulse_lib

LINE = 65_536  # bytes; what is longer is not ours
# A machine that does not answer is lost after 10 + 4 · 5 seconds.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
UNANSWERED_MS = 30_000  # the same for what was sent and not acknowledged


@dataclasses.dataclass(frozen=True)
class Peer:
  """Another process."""

  index: int
  host: str
  pid: int

  def __str__(self) -> str:
    return f"process {self.index} ({self.host}, pid {self.pid})"


@dataclasses.dataclass(frozen=True)
class Loss:
  """A process that is gone.

  Attributes:
    why: its last words; None: it had none. code: its exit code, if it said so.
    silent: seconds without a sign of life, of one that hangs; None: it is gone.
    stands: in words, that nobody goes on; of the one that is waited for.
    did: in words, what it last said that it does; None: it said nothing.
  """

  peer: Peer
  why: str | None = None
  code: int | None = None
  silent: float | None = None
  stands: str | None = None
  did: str | None = None


class Line:
  """A connection that carries lines of JSON."""

  def __init__(self, sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
      if hasattr(socket, name):  # Linux
        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
      sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNANSWERED_MS)
    self.sock = sock
    self._rest = b""
    self._sending = threading.Lock()

  def fileno(self):
    return self.sock.fileno()

  def send(self, **words):
    """Never raises: who is gone is noticed where it is read."""
    with contextlib.suppress(OSError), self._sending:
      self.sock.sendall(json.dumps(words).encode() + b"\n")

  def receive(self):
    """Messages that have come, at least one or, from who is gone or a stranger, [None].

    Waits as long as the socket's time-out says.
    """
    while b"\n" not in self._rest:
      try:
        got = self.sock.recv(4_096)
      except TimeoutError:
        raise
      except OSError:
        return [None]
      self._rest += got
      if not got or len(self._rest) > LINE:
        return [None]
    *lines, self._rest = self._rest.split(b"\n")
    try:
      messages = [json.loads(line) for line in lines]
    except ValueError:
      return [None]
    return [m if isinstance(m, dict) else None for m in messages]

  def close(self):
    self.sock.close()


class Watch:
  """Holds the connections of a run.

  Attributes:
    me: this process. peers: {index: Peer}; those that are not the first know it alone.
    silence: seconds after which one that gives no sign of life is lost; 0: never. The
      same in all processes.
    stand: seconds after which, where no process goes on, the one that is behind is
      lost; 0: never. It is process 0 that looks, and it knows by the signs of life.
    doing: tells what this process does.
  """

  def __init__(
    self,
    me: Peer,
    peers: dict[int, Peer],
    lines: dict[int, Line],
    *,
    silence: float,
    stand: float,
  ):
    self.me, self.peers, self.silence, self.stand = me, peers, silence, stand
    self.doing: Callable[[], course.Doing] = course.now
    self._lines = lines
    self._done = set()
    self._did: dict[int, str] = {}
    self._at_end = False
    self._ended = threading.Event()
    self._all_done = threading.Event()
    self._lost: Loss | None = None
    self._failing = False

  def start(self, on_loss: Callable[[Loss], None]) -> None:
    """Calls `on_loss` once, in a thread of its own, when a process is gone."""
    follow = self._serve if self.me.index == 0 else self._listen

    def lose(loss):
      if not self._failing:  # otherwise they leave because this process does
        self._lost = loss
        on_loss(loss)

    threading.Thread(
      target=follow, args=(lose,), name="vlp_jax watch", daemon=True
    ).start()

  def leave_if_lost(self, *, by_mistake: bool = True) -> None:
    """Leaves it to `on_loss`, where it runs, to end this process.

    Args:
      by_mistake: also where the other process has said what it died of.
    """
    if self._lost and (by_mistake or self._lost.why is None):
      threading.Event().wait()

  def end(self) -> None:
    """Waits until all processes have come to their end.

    To be called after `start`: if one dies meanwhile, it is a loss.
    """
    self._at_end = True
    if self.me.index:
      self._lines[0].send(done=True)
    else:
      if self._lines:
        self._all_done.wait()
      self._ended.set()
      for line in self._lines.values():
        line.send(end=True)
    self._ended.wait()
    self.close()

  def close(self) -> None:
    """Lets the others go: for them, this process is gone."""
    for line in self._lines.values():
      line.close()

  def fail(self, why: str, code: int) -> None:
    """Tells the others that this process stops, why, and with which exit code."""
    self._failing = True
    if self.me.index:
      self._lines[0].send(failed=why[:2_000], code=code)
    else:
      self.pass_on(Loss(self.me, why[:2_000], code))

  def pass_on(self, loss: Loss, *, wait: float = 10.0) -> None:
    """Of process 0: tells all others who is gone, and lets them leave before it does.

    JAX ends who loses process 0 without a clear word.
    """
    if self.me.index:
      return
    for line in self._lines.values():
      line.send(lost=dataclasses.asdict(loss))
    end = time.monotonic() + wait
    for index, line in self._lines.items():
      if loss.silent is not None and index == loss.peer.index:
        continue
      with contextlib.suppress(OSError):
        line.sock.settimeout(max(0.001, end - time.monotonic()))
        while line.sock.recv(4_096):
          pass

  def _serve(self, on_loss):
    """Process 0: reads from all."""
    for index, said in self._said():
      if said is not None and "done" in said:
        self._done.add(index)
        if len(self._done) == len(self._lines):
          self._all_done.set()
        continue
      said = said or {}
      loss = Loss(self.peers[index], said.get("failed"), said.get("code"))
      how = {key: said.get(key) for key in ("silent", "stands")}
      on_loss(dataclasses.replace(loss, did=self._did.get(index), **how))
      return

  def _listen(self, on_loss):
    """Others: read from process 0."""
    _, said = next(self._said())
    if said is not None and "end" in said:
      self._ended.set()
    elif said is not None and "lost" in said:
      lost = said["lost"]
      on_loss(Loss(**lost | dict(peer=Peer(**lost["peer"]))))
    else:
      silent = (said or {}).get("silent")
      on_loss(Loss(self.peers[0], silent=silent, did=self._did.get(0)))

  def _said(self):
    """(process, message) as they come, until the end; gives and takes signs of life.

    The message is None of one that is gone, {"silent": seconds} of one that hangs, and
    {"stands": words} of one that all wait for.
    """
    pulse = pulse_lib.Pulse(self._lines, self.silence)
    # Between two signs of life nobody is seen to go on.
    stand = self.stand and max(self.stand, 2 * (pulse.every or 0))
    turns = pulse_lib.Turns(len(self.peers), 0 if self.me.index else stand)
    with selectors.DefaultSelector() as ready:
      for index, line in self._lines.items():
        ready.register(line, selectors.EVENT_READ, index)
      while not self._ended.is_set() and (pulse.every or ready.get_map()):
        for key, _ in ready.select(pulse.every):
          pulse.hear(key.data)
          try:
            messages = key.fileobj.receive()
          except TimeoutError:  # `pass_on`, in another thread, has read it
            continue
          for said in messages:
            if said is not None and "alive" in said:
              doing = course.Doing(**said["doing"])
              self._did[key.data] = f"{doing}, for {doing.seconds:.0f} s"
              turns.tell(key.data, doing)
              continue
            if said is not None and "done" in said:
              ready.unregister(key.fileobj)
              pulse.forget(key.data)
              turns.forget(key.data)
            yield key.data, said
        if pulse.speak():
          doing = dataclasses.asdict(self.doing())
          for line in self._lines.values():
            line.send(alive=True, doing=doing)
        if pulse.overslept():
          turns.begin_anew()
        if hangs := pulse.silent():
          yield hangs[0], dict(silent=hangs[1])
        if self.me.index == 0:
          if self._at_end:
            turns.forget(0)
          else:
            turns.tell(0, self.doing())
          if still := turns.stand_still():
            yield still.last, dict(stands=str(still))
