"""Processes that find each other, and notice at once when one of them is gone.

Process 0 listens on the coordinator's port, each other one connects and says who it is.
When all are there the port is free for JAX's own service, while the connections stay:
the kernel closes those of a process that dies, so nobody has to poll, and its keepalive
finds a machine that is lost. Process 0 passes on what it learns.

JAX's own service says only that "another task died", 100 s later, and a process that
does not come at the start is a time-out without a name.

What is sent: lines of JSON. Process i to 0: {"hello"}, then {"done"} or {"failed"}; 0
to i: {"go"} or {"refused"}, then {"lost"} or {"end"}.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import json
import os
import selectors
import socket
import threading
import time

from vlp_jax.training import cluster

GREETING = "vlp_jax 1"
RETRY = 0.25  # seconds between two attempts to reach process 0, or to get its port
LINE = 65_536  # bytes; what is longer is not ours
# A machine that does not answer is lost after 10 + 4 · 5 seconds.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
UNANSWERED_MS = 30_000  # the same for what was sent and not acknowledged


class StartError(OSError):
  """Not all processes came; the message says which."""


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
  """

  peer: Peer
  why: str | None = None
  code: int | None = None


class _Line:
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

  def fileno(self):
    return self.sock.fileno()

  def send(self, **words):
    """Never raises: who is gone is noticed where it is read."""
    with contextlib.suppress(OSError):
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


def meet(place: cluster.Place, *, limit: float) -> "Watch":
  """Waits until all processes are there.

  Args:
    place: of this process. limit: seconds.

  Raises:
    StartError: within the limit not all came; says on every process which did not.
  """
  me = Peer(place.index, socket.gethostname(), os.getpid())
  end = time.monotonic() + limit
  if place.index == 0:
    peers, lines = _gather(place, me, end, limit)
  else:
    peers, lines = _join(place, me, end, limit)
  return Watch(me, peers, lines)


# --- The start -----------------------------------------------------------------------


def _listen(place, end):
  """A listening socket on the coordinator's port, which one who dies may still hold."""
  while True:
    try:
      if socket.has_dualstack_ipv6():
        return socket.create_server(
          ("", place.port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4_096
        )
      return socket.create_server(("", place.port), backlog=4_096)
    except OSError as error:
      if time.monotonic() > end:
        raise StartError(
          f"process 0 cannot listen on port {place.port} ({error.strerror}):"
          " end what holds it, or say another port."
        ) from error
      time.sleep(RETRY)


def _gather(place, me, end, limit):
  """(peers by index, lines by index) of all, for process 0."""
  peers, lines, others = {0: me}, {}, []
  server = _listen(place, end)
  try:
    with server, selectors.DefaultSelector() as ready:
      ready.register(server, selectors.EVENT_READ)
      while len(peers) < place.count:
        left = end - time.monotonic()
        if left <= 0:
          _refuse(lines, _missing(place, peers, limit))
        for key, _ in ready.select(max(0, left)):
          if key.fileobj is server:
            with contextlib.suppress(OSError):
              others.append(_Line(server.accept()[0]))
              others[-1].sock.settimeout(5.0)
              ready.register(others[-1], selectors.EVENT_READ)
            continue
          line = key.fileobj
          peer = _hello(line, place, peers, lines)
          if peer is not None:
            peers[peer.index], lines[peer.index] = peer, line
            others.remove(line)
            continue
          # A stranger (a scan, a health check), or one that died while it waited.
          ready.unregister(line)
          line.close()
          for index in [i for i, each in lines.items() if each is line]:
            del lines[index], peers[index]
  finally:
    for line in others:
      line.close()
  for line in lines.values():
    line.sock.settimeout(None)
    line.send(go=True, pid=me.pid)
  return peers, lines


def _hello(line, place, peers, lines):
  """The peer that a line's first message names; None for anything else."""
  try:
    said = line.receive()[0]
  except TimeoutError:
    return None
  if said is None or said.get("hello") != GREETING:
    return None
  peer = Peer(int(said["index"]), str(said["host"]), int(said["pid"]))
  if said["count"] != place.count:
    lines[peer.index] = line
    _refuse(
      lines,
      f"{peer} was started as one of {said['count']} processes, process 0 as one of"
      f" {place.count}: start all with the same number.",
    )
  if peer.index in peers:
    other, lines[-1] = peers[peer.index], line
    _refuse(
      lines,
      f"two processes say that they are number {peer.index}: {other.host}, pid"
      f" {other.pid}, and {peer.host}, pid {peer.pid}: number them 0 …"
      f" {place.count - 1}.",
    )
  return peer


def _refuse(lines, text):
  for line in lines.values():
    line.send(refused=text)
    line.close()
  raise StartError(text)


def _missing(place, peers, limit):
  lacking = [str(i) for i in range(place.count) if i not in peers]
  came = ", ".join(f"{i} ({peers[i].host})" for i in sorted(peers))
  return (
    f"after {limit:g} s {len(lacking)} of {place.count} processes did not come:"
    f" {', '.join(lacking)}. There are {came}. Look at the logs and machines of those"
    " that are missing; VLP_JAX_START_TIMEOUT=… waits longer."
  )


def _join(place, me, end, limit):
  """(peers, lines) of a process that is not the first: it knows process 0 alone."""
  line = _reach(place, end, limit)
  line.send(hello=GREETING, index=me.index, count=place.count, host=me.host, pid=me.pid)
  # Process 0 keeps the time, and may have begun a little later.
  line.sock.settimeout(limit + 30)
  try:
    said = line.receive()[0]
  except TimeoutError:
    said = None
  if said is None or "refused" in said:
    line.close()
  if said is None:
    raise StartError(
      f"process 0 at {place.coordinator} went away while process {place.index} waited"
      " for the others: see its log. (Or something else listens there.)"
    )
  if "refused" in said:
    raise StartError(said["refused"])
  line.sock.settimeout(None)
  return {0: Peer(0, place.host, int(said.get("pid", 0)))}, {0: line}


def _reach(place, end, limit):
  while True:
    try:
      return _Line(socket.create_connection((place.host, place.port), timeout=5.0))
    except OSError as error:
      if time.monotonic() > end:
        raise StartError(
          f"process 0 of {place.count} did not come: after {limit:g} s nobody answers"
          f" at {place.coordinator} ({error.strerror or error}). Look at its log; or"
          " the address is wrong, or a firewall is between. VLP_JAX_START_TIMEOUT=…"
          " waits longer."
        ) from error
      time.sleep(RETRY)


# --- The run -------------------------------------------------------------------------


class Watch:
  """Holds the connections of a run.

  Attributes:
    me: this process. peers: {index: Peer}; those that are not the first know it alone.
  """

  def __init__(self, me: Peer, peers: dict[int, Peer], lines: dict[int, _Line]):
    self.me, self.peers = me, peers
    self._lines = lines
    self._done = set()
    self._ended = threading.Event()
    self._all_done = threading.Event()
    self._lost = threading.Event()
    self._failing = False

  def start(self, on_loss: Callable[[Loss], None]) -> None:
    """Calls `on_loss` once, in a thread of its own, when a process is gone."""
    follow = self._serve if self.me.index == 0 else self._listen

    def lose(loss):
      if not self._failing:  # otherwise they leave because this process does
        self._lost.set()
        on_loss(loss)

    threading.Thread(
      target=follow, args=(lose,), name="vlp_jax watch", daemon=True
    ).start()

  def leave_if_lost(self) -> None:
    """Leaves it to `on_loss`, where it runs, to end this process."""
    if self._lost.is_set():
      threading.Event().wait()

  def end(self) -> None:
    """Waits until all processes have come to their end.

    To be called after `start`: if one dies meanwhile, it is a loss.
    """
    if self.me.index:
      self._lines[0].send(done=True)
    else:
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
      line.send(lost=dataclasses.asdict(loss.peer), why=loss.why, code=loss.code)
    end = time.monotonic() + wait
    for line in self._lines.values():
      with contextlib.suppress(OSError):
        line.sock.settimeout(max(0.001, end - time.monotonic()))
        while line.sock.recv(4_096):
          pass

  def _serve(self, on_loss):
    """Process 0: reads from all."""
    with selectors.DefaultSelector() as ready:
      for index, line in self._lines.items():
        ready.register(line, selectors.EVENT_READ, index)
      while len(self._done) < len(self._lines):
        for key, _ in ready.select():
          for said in key.fileobj.receive():
            if said is not None and "done" in said:
              self._done.add(key.data)
              ready.unregister(key.fileobj)
              continue
            said = said or {}
            peer = self.peers[key.data]
            on_loss(Loss(peer, said.get("failed"), said.get("code")))
            return
    self._all_done.set()

  def _listen(self, on_loss):
    """Others: read from process 0."""
    said = self._lines[0].receive()[0]
    if said is None:
      on_loss(Loss(self.peers[0]))
    elif "lost" in said:
      on_loss(Loss(Peer(**said["lost"]), said["why"], said["code"]))
    else:
      self._ended.set()
