"""Several processes that are one run: they start together, and none is left waiting.

The entry points run inside of `joined()`. Alone, it does nothing.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import logging
import math
import os
import pathlib
import socket
import sys
import threading
import time
import traceback
from typing import NoReturn

import jax
from jax.experimental import multihost_utils
import numpy as np

from vlp_jax.training import cluster
from vlp_jax.training import course
from vlp_jax.training import rendezvous
from vlp_jax.training import watch as watch_lib

# Of sysexits.h, EX_TEMPFAIL: the same command goes on from the last checkpoint.
EXIT_TRY_AGAIN = 75
# Seconds for news of another process, before an error is taken for our own; and for an
# error of our own to show, before that of another process is told.
GRACE = 2.0
# Seconds in which one has to go on. Less than the 1800 after which Gloo, by which CPUs
# talk to each other, gives up: that would be an error of one who is not at fault.
STALL = 1500
# Seconds in which a process says what is to be said, and leaves.
LEAVE = 30.0


@contextlib.contextmanager
def joined(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
  """Joins the run that the environment names, before JAX looks for devices.

  VLP_JAX_COORDINATOR=host:port, VLP_JAX_NUM_PROCESSES and VLP_JAX_PROCESS_ID, or tasks
  of SLURM's srun, or a TPU pod: see `cluster`. Limits are seconds, those of process 0
  are those of all, and 0 is none of the last two:

  VLP_JAX_START_TIMEOUT (300): all have to come.
  VLP_JAX_HANG_TIMEOUT (120): each has to give a sign of life, which it cannot while it
    loads a library.
  VLP_JAX_STALL_TIMEOUT (1500): once all have started, one has to go on: to take a
    step, to evaluate a batch, to have saved; otherwise the one that has come least far
    hangs. It has to be longer than a checkpoint takes to be written or read, and than
    an evaluation takes to compile. Wants signs of life, and is at least half of the
    time after which they are missed.

  While the run lasts, a process that dies or hangs ends all others with a message and
  exit code 75; one that leaves by an error is waited for no longer than it takes to
  tell. One that is alone is watched where VLP_JAX_STALL_TIMEOUT is set.

  Raises:
    ValueError: the environment is half given or wrong.
    SystemExit: 75, not all came; the message says who did not.
  """
  place = cluster.find(environ)
  limit = _seconds(environ, "VLP_JAX_START_TIMEOUT", 300)
  silence = _seconds(environ, "VLP_JAX_HANG_TIMEOUT", 120)
  # Alone, it may stand in a debugger, and nobody may be there to start it again.
  stand = _seconds(environ, "VLP_JAX_STALL_TIMEOUT", STALL if place else 0)
  if place is None:
    with _alone(silence, stand):
      yield
    return
  begun = time.monotonic()
  try:
    watch = rendezvous.meet(place, limit=limit, silence=silence, stand=stand)
  except rendezvous.StartError as error:
    _say(f"error: start of process {place.index} of {place.count}: {error}")
    raise SystemExit(EXIT_TRY_AGAIN) from error
  if place.index == 0:
    _say(_all_there(watch, time.monotonic() - begun))
  watch.start(lambda loss: _leave(watch, loss))
  with _failing_together(watch):
    _initialize(place, limit, silence)
    yield
    watch.end()


@contextlib.contextmanager
def _alone(silence, stand):
  """One process of one, which may hang as well."""
  me = watch_lib.Peer(0, socket.gethostname(), os.getpid())
  watch = watch_lib.Watch(me, {0: me}, {}, silence=silence, stand=stand)
  if stand:
    watch.start(lambda loss: _leave(watch, loss))
  try:
    yield
  finally:
    watch.end()


def _seconds(environ, name, default):
  try:
    seconds = float(environ.get(name) or default)
  except ValueError:
    seconds = -1.0
  if not 0 <= seconds < math.inf:
    raise ValueError(f"{name}={environ[name]!r}: want seconds.")
  return seconds


def _initialize(place, limit, silence):
  # XLA's CPU devices reach each other by it alone.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(
    coordinator_address=place.coordinator,
    num_processes=place.count,
    process_id=place.index,
    local_device_ids=place.local_devices,
    # It would hide all but one GPU from a task of SLURM that has a whole node.
    cluster_detection_method="deactivate",
    initialization_timeout=max(60, int(limit)),
    # JAX's own notice of who hangs, which has no name and no clear word, comes later.
    heartbeat_timeout_seconds=max(100, 2 * math.ceil(silence)) if silence else 10**8,
  )


def _all_there(watch, seconds):
  hosts = sorted({peer.host for peer in watch.peers.values()})
  named = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if hosts[4:] else "")
  return f"{len(watch.peers)} processes met after {seconds:.1f} s, on {named}"


# --- The end that was not planned -----------------------------------------------------


@contextlib.contextmanager
def _failing_together(watch):
  """An error of this process is told to the others; then it leaves at once.

  JAX, left to itself, waits at its end for processes that wait for this one.
  """
  try:
    yield
  except BaseException as error:
    if isinstance(error, SystemExit) and error.code in (0, None):
      raise
    # Where a process died, what fails here is a consequence: the watch knows, and ends
    # this process with what is to be said.
    time.sleep(GRACE)
    told = isinstance(error, SystemExit)
    watch.leave_if_lost(by_mistake=not told)
    if told:
      code = error.code if isinstance(error.code, int) else 1
    else:
      traceback.print_exception(error)
      code = 1
    watch.fail(_why(error), code)
    _exit(code)


def _why(error):
  """One line of what a process died of."""
  cause = error.__cause__ if isinstance(error, SystemExit) else error
  if cause is None:
    return f"exit code {error.code}"
  lines = str(cause).splitlines()
  return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__


def _leave(watch, loss):
  """In the watch's thread: another process is gone, so this one leaves too."""
  me, code = watch.me, loss.code or EXIT_TRY_AGAIN
  _leave_anyway(code)
  if loss.why is None:
    then = ": the same command on all goes on from the last checkpoint"
    why = "is gone, without a word: killed, out of memory, or its machine is lost"
    if loss.silent is not None:
      why = (
        f"hangs: no sign of life for {loss.silent:.0f} s (VLP_JAX_HANG_TIMEOUT); it is"
        " stopped, or its machine or its disk stands still. End it"
      )
    if loss.did is not None and loss.stands is None:
      then += f". What it said last: it {loss.did}"
    if loss.stands is not None:
      why = f"is waited for: {loss.stands} (VLP_JAX_STALL_TIMEOUT)"
  else:
    # Maybe all make the same mistake, and each is about to say so.
    time.sleep(GRACE)
    then, why = "", f"stopped: {loss.why.rstrip('.')}"
  who = f"process {me.index} ({me.host}) stops too"
  if loss.peer == me:
    who = "it stops"
  _say(f"error: {loss.peer} {why}. So {who}, with exit code {code}{then}.")
  if loss.stands is not None:
    _say("\n  ".join([f"process {me.index} stands at", *course.stands()]))
  watch.pass_on(loss)
  _exit(code)


def _leave_anyway(code):
  """Leaves in LEAVE seconds: the log may be on the disk that does not answer."""

  def leave():
    time.sleep(LEAVE)
    os._exit(code)

  threading.Thread(target=leave, name="vlp_jax leave", daemon=True).start()


def _say(text):
  """To the terminal, whatever another thread holds."""
  os.write(sys.__stderr__.fileno(), f"vlp_jax: {text}\n".encode())


def _exit(code) -> NoReturn:
  """Leaves without JAX's farewell, which waits for who may be gone."""
  logging.shutdown()
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(Exception):
      stream.flush()
  os._exit(code)


# --- What one does for all ------------------------------------------------------------


def made_once(path: pathlib.Path, make: Callable[[], None]) -> None:
  """A file that process 0 makes, unless it is there, and that all have afterwards.

  Its content goes from process to process: folders may be shared, or each its own.

  Args:
    path: of the file. make: writes it, whole or not at all.
  """
  if jax.process_count() == 1:
    if not path.exists():
      make()
    return
  first = jax.process_index() == 0
  if first and not path.exists():
    make()
  content = np.frombuffer(path.read_bytes() if first else b"", np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(content.size)))
  content = content if first else np.zeros(size, np.uint8)
  content = np.asarray(multihost_utils.broadcast_one_to_all(content), np.uint8)
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
    partial.write_bytes(content.tobytes())
    partial.replace(path)
