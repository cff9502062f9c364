"""Signals become a flag; a second one acts; handlers are put back."""

import http.server
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from vlp_jax.training import preemption


@pytest.fixture(autouse=True)
def default_handlers():
  """Started in a shell's background, this process ignores SIGINT."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


NAMES = preemption.Preemption().signals


def handlers(names=NAMES):
  return [signal.getsignal(signal.Signals[name]) for name in names]


@pytest.mark.parametrize("name", NAMES)
def test_the_first_signal_is_a_flag(name):
  before = handlers()
  with preemption.Stop() as stop:
    assert stop.asked is None and not stop.reached()
    os.kill(os.getpid(), signal.Signals[name])
    assert stop.asked == name and stop.reached()
    assert stop.code == 128 + signal.Signals[name]
  assert handlers() == before


def test_the_config_names_the_signals():
  before = handlers(["SIGUSR2", "SIGTERM"])
  with preemption.Stop(preemption.Preemption(signals=("SIGUSR2",))) as stop:
    assert handlers(["SIGTERM"]) == before[1:]
    os.kill(os.getpid(), signal.SIGUSR2)
    assert stop.reached() and stop.asked == "SIGUSR2"
  assert handlers(["SIGUSR2", "SIGTERM"]) == before


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP", "TERM", "15"])
def test_signals_that_cannot_be_caught(name):
  with pytest.raises(ValueError, match=rf"config: preemption.signals: '{name}' is no"):
    preemption.Preemption(signals=(name,))


def test_a_second_signal_acts():
  with preemption.Stop() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.asked == "SIGINT"
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
  ("first", "second", "code"),
  [
    ("SIGTERM", "SIGTERM", -signal.SIGTERM),
    ("SIGINT", "SIGTERM", -signal.SIGTERM),
    ("SIGTERM", "SIGINT", -signal.SIGINT),
  ],
)
def test_a_second_signal_acts_whichever_came_first(first, second, code):
  # A machine sends SIGTERM to a run that somebody has just pressed Ctrl-C in.
  script = f"""
    import os, signal
    from vlp_jax.training import preemption
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with preemption.Stop() as stop:
      os.kill(os.getpid(), signal.{first})
      assert stop.asked == "{first}"
      os.kill(os.getpid(), signal.{second})
    print("went on")
  """
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
  )
  assert done.returncode == code
  assert "went on" not in done.stdout


def test_handlers_are_restored_after_an_error():
  before = handlers()
  with pytest.raises(ValueError), preemption.Stop() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.asked
    raise ValueError
  assert handlers() == before


# --- Among several processes ---


class Board:
  """Notes of threads that stand for processes."""

  def __init__(self):
    self.notes = {}

  def of(self, index):
    board = self

    class Mine:
      def put(self, name, text):
        board.notes[name, index] = text

      def read(self, name):
        return {i: text for (n, i), text in list(board.notes.items()) if n == name}

    return Mine()


def processes(monkeypatch, count, *, silent=()):
  """Stops as `count` processes would have them; some of which do not answer."""
  monkeypatch.setattr(preemption, "POLL", 0.01)
  monkeypatch.setattr(preemption.jax, "process_count", lambda: count)
  board, stops = Board(), []
  for index in range(count):
    stop = preemption.Stop()
    stop._board = board.of(index)
    if index not in silent:
      stop._start(stop._agree)
    stops.append(stop)
  return stops


def until(condition):
  end = time.monotonic() + 10
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.005)


def test_all_stop_at_the_same_step(monkeypatch):
  """One is asked; they have begun 3, 7 and 5 steps by then."""
  stops = processes(monkeypatch, 3)
  for stop, begun in zip(stops, (3, 7, 5), strict=True):
    assert not any(stop.reached() for _ in range(begun))
  stops[2]._notice("SIGTERM")
  until(lambda: all(stop.asked for stop in stops))
  for stop, more in zip(stops, (4, 0, 2), strict=True):
    assert not any(stop.reached() for _ in range(more))
    assert stop.reached(), "the eighth"
    assert stop.asked == "SIGTERM (process 2)" and stop.code == 128 + signal.SIGTERM
    # Also when the run goes back and takes more steps.
    assert stop.reached()
    stop.__exit__()


def test_all_stop_at_the_same_step_while_they_run(monkeypatch):
  stops = processes(monkeypatch, 3)
  taken = [0] * 3

  def run(index):
    while not stops[index].reached():
      taken[index] += 1
      time.sleep(0.001 * (index + 1))

  threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
  for thread in threads:
    thread.start()
  until(lambda: min(taken) > 10)
  for stop in stops[:2]:
    stop._notice("SIGTERM")
  for thread in threads:
    thread.join(timeout=20)
  assert len(set(taken)) == 1, taken
  for stop in stops:
    assert stop.asked.startswith("SIGTERM")
    stop.__exit__()


def test_a_process_that_does_not_answer_holds_nobody_for_ever(monkeypatch, caplog):
  monkeypatch.setattr(preemption, "ANSWER", 0.1)
  stops = processes(monkeypatch, 2, silent=(1,))
  stops[0]._notice("SIGTERM")
  until(lambda: caplog.records)
  assert "processes [1] do not answer" in caplog.text
  assert not stops[0].reached()
  stops[0].__exit__()


# --- Google's metadata server ---


@pytest.fixture
def metadata(monkeypatch):
  """{path: what a server on this machine answers}, with the header that it wants."""
  answers = {"maintenance-event": "NONE", "preempted": "FALSE"}

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      place, _, name = self.path.rpartition("/")
      known = place == "/computeMetadata/v1/instance" and name in answers
      known = known and self.headers["Metadata-Flavor"] == "Google"
      self.send_response(200 if known else 403)
      self.end_headers()
      self.wfile.write(answers.get(name, "").encode() if known else b"")

    def log_message(self, *args):
      pass

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
  monkeypatch.setattr(preemption, "MAINTENANCE_POLL", 0.02)
  yield answers
  server.shutdown()
  thread.join()
  server.server_close()


@pytest.mark.parametrize(
  ("name", "text"),
  [
    ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"),
    ("preempted", "TRUE"),
  ],
)
def test_a_notice_of_the_metadata_server(metadata, name, text):
  with preemption.Stop(preemption.Preemption(maintenance="gce")) as stop:
    # A machine that is moved while it runs needs no stop.
    metadata["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
    time.sleep(0.1)
    assert not stop.reached()
    metadata[name] = text
    until(stop.reached)
    assert stop.asked == f"SIGTERM ({name}: {text})"
    assert stop.code == 128 + signal.SIGTERM


def test_a_metadata_server_that_is_away_is_told_once(metadata, caplog):
  answers = dict(metadata)
  metadata.clear()
  with preemption.Stop(preemption.Preemption(maintenance="gce")) as stop:
    until(lambda: caplog.records)
    time.sleep(0.1)
    assert not stop.reached()
    assert len(caplog.records) == 1 and "no answer of the metadata" in caplog.text
    metadata |= answers | {"preempted": "TRUE"}
    until(stop.reached)


def test_nobody_is_asked_by_default(metadata):
  metadata["preempted"] = "TRUE"
  with preemption.Stop() as stop:
    time.sleep(0.1)
    assert not stop.reached() and not stop._threads
