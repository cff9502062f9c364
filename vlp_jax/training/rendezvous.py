"""Processes that find each other at the start of a run, or say who did not come.

Process 0 listens on the coordinator's port, each other one connects and says who it is.
When all are there the port is free for JAX's own service, while the connections stay:
see `watch`. In JAX alone a process that does not come is a time-out without a name.

What is sent: lines of JSON. Process i to 0: {"hello"}; 0 to i: {"go"} or {"refused"}.
"""

import contextlib
import os
import selectors
import socket
import time

from vlp_jax.training import cluster
from vlp_jax.training import watch as watch_lib

GREETING = "vlp_jax 1"
RETRY = 0.25  # seconds between two attempts to reach process 0, or to get its port


class StartError(OSError):
  """Not all processes came; the message says which."""


def meet(
  place: cluster.Place, *, limit: float, silence: float = 0.0, stand: float = 0.0
) -> watch_lib.Watch:
  """Waits until all processes are there.

  Args:
    place: of this process. limit: seconds. silence, stand: of `Watch`; those of process
      0 are those of all.

  Raises:
    StartError: within the limit not all came; says on every process which did not.
  """
  me = watch_lib.Peer(place.index, socket.gethostname(), os.getpid())
  end = time.monotonic() + limit
  if place.index == 0:
    peers, lines = _gather(place, me, end, limit)
    for line in lines.values():
      line.send(go=True, pid=me.pid, silence=silence)
  else:
    peers, lines, silence = _join(place, me, end, limit)
  return watch_lib.Watch(me, peers, lines, silence=silence, stand=stand)


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
              others.append(watch_lib.Line(server.accept()[0]))
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
  return peers, lines


def _hello(line, place, peers, lines):
  """The peer that a line's first message names; None for anything else."""
  try:
    said = line.receive()[0]
  except TimeoutError:
    return None
  if said is None or said.get("hello") != GREETING:
    return None
  peer = watch_lib.Peer(int(said["index"]), str(said["host"]), int(said["pid"]))
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
  """(peers, lines, silence) of one that is not the first: it knows process 0 alone."""
  line = _reach(place, end, limit)
  line.send(hello=GREETING, index=me.index, count=place.count, host=me.host, pid=me.pid)
  # Process 0 keeps the time, and may have begun a little later.
  line.sock.settimeout(limit + 30)
  try:
    said = line.receive()[0]
  except TimeoutError:
    said = None
  if said is not None and not said.keys() & {"go", "refused"}:
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
  first = watch_lib.Peer(0, place.host, int(said["pid"]))
  return {0: first}, {0: line}, float(said["silence"])


def _reach(place, end, limit):
  while True:
    try:
      return watch_lib.Line(
        socket.create_connection((place.host, place.port), timeout=5.0)
      )
    except OSError as error:
      if time.monotonic() > end:
        raise StartError(
          f"process 0 of {place.count} did not come: after {limit:g} s nobody answers"
          f" at {place.coordinator} ({error.strerror or error}). Look at its log; or"
          " the address is wrong, or a firewall is between. VLP_JAX_START_TIMEOUT=…"
          " waits longer."
        ) from error
      time.sleep(RETRY)
