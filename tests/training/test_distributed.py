"""Runs of two processes on this machine: they start, and one of them does not go on."""

import json
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from tests import processes
from tests import runs

ROUNDS = "tests.training.rounds"
# As between meshes (test_resume.py): sums that come in another order, divided by Adam.
LOSS_TOLERANCE = 1e-5


def wait_for(done, started, seconds=300):
  end = time.monotonic() + seconds
  try:
    while not done():
      assert time.monotonic() < end, "it did not come so far"
      assert all(p.poll() is None for p in started), "a process ended"
      time.sleep(0.02)
  except BaseException:
    for process in started:
      process.kill()
      process.wait()
    raise


def rounds(workdir, **env):
  """Two processes, of which each has gone round."""
  env = {"ROUNDS": "100000"} | env
  started = processes.start(workdir, module=ROUNDS, **env)
  wait_for(
    lambda: all("round 1" in processes.log(workdir, i) for i in range(2)), started
  )
  return started


def test_a_process_that_never_comes_is_named(tmp_path):
  begun = time.monotonic()
  started = processes.start(tmp_path / "run", only=(0,), VLP_JAX_START_TIMEOUT="1")
  (log,) = processes.finish(started, tmp_path / "run", codes=(75,))
  assert time.monotonic() - begun < 60
  assert "vlp_jax: error: start of process 0 of 2: after 1 s 1 of 2" in log
  assert "did not come: 1. There are 0 (" in log
  assert "Traceback" not in log


def test_half_an_environment_is_a_mistake(tmp_path):
  started = processes.start(tmp_path / "run", only=(0,), VLP_JAX_NUM_PROCESSES="")
  (log,) = processes.finish(started, tmp_path / "run", codes=(2,))
  assert "without VLP_JAX_NUM_PROCESSES: set all three" in log


def test_they_work_and_end_together(tmp_path):
  """Each feeds its rows on any mesh, and has what process 0 made: see rounds.py."""
  env = {"ROUNDS": "3", "FOLDER": str(tmp_path / "folder")}
  env |= {"VLP_JAX_HANG_TIMEOUT": "0"}  # which JAX's service has to take, too
  started = processes.start(tmp_path / "run", module=ROUNDS, devices=2, **env)
  logs = processes.finish(started, tmp_path / "run")
  assert "2 processes met after" in logs[0]
  assert all("error" not in log for log in logs), logs


@pytest.mark.parametrize("gone", [0, 1])
def test_one_is_killed(tmp_path, gone):
  """JAX's own word about it is "another task died", or none for 100 seconds."""
  started = rounds(tmp_path / "run")
  started[gone].kill()
  begun = time.monotonic()
  left = 1 - gone
  codes = [-signal.SIGKILL, 75] if gone == 0 else [75, -signal.SIGKILL]
  logs = processes.finish(started, tmp_path / "run", codes=tuple(codes))
  assert time.monotonic() - begun < 20, "it took too long to notice"
  told = f"vlp_jax: error: process {gone} ("
  assert told in logs[left]
  assert f"pid {started[gone].pid}) is gone, without a word" in logs[left]
  assert "the same command on all goes on from the last checkpoint" in logs[left]


@pytest.mark.slow
@pytest.mark.parametrize("hangs", [0, 1])
def test_one_hangs(tmp_path, hangs):
  """JAX ends the other after 100 s by SIGABRT, with a stack and without a name."""
  started = rounds(tmp_path / "run", VLP_JAX_HANG_TIMEOUT="5")
  started[hangs].send_signal(signal.SIGSTOP)
  begun = time.monotonic()
  left = 1 - hangs
  try:
    assert started[left].wait(timeout=60) == 75
    assert 3 < time.monotonic() - begun < 20  # the last sign may be a second old
    (said,) = [
      x for x in processes.log(tmp_path / "run", left).splitlines() if "error" in x
    ]
    assert f"vlp_jax: error: process {hangs} (" in said
    assert f"pid {started[hangs].pid}) hangs: no sign of life for 5 s" in said
    assert (
      "End it: the same command on all goes on from the last checkpoint" not in said
    )
    assert f"So process {left} (" in said
    # Woken, it leaves as well, unless JAX is quicker.
    started[hangs].send_signal(signal.SIGCONT)
    assert started[hangs].wait(timeout=60) in (75, -signal.SIGABRT)
  finally:
    for process in started:
      process.kill()
      process.wait()


@pytest.mark.slow
def test_all_are_suspended_and_go_on(tmp_path):
  """As by `scontrol suspend`, for longer than any limit."""
  limits = dict(VLP_JAX_HANG_TIMEOUT="2", VLP_JAX_STALL_TIMEOUT="3", ROUNDS="150")
  started = rounds(tmp_path / "run", **limits)
  for number in (signal.SIGSTOP, signal.SIGCONT):
    for process in started:
      process.send_signal(number)
    time.sleep(5)
  processes.finish(started, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("stuck", [0, 1])
def test_one_gets_no_data(tmp_path, stuck):
  """It lives, and waits for a file system, say; the other waits for it."""
  limits = dict(VLP_JAX_HANG_TIMEOUT="2", VLP_JAX_STALL_TIMEOUT="4")
  started = rounds(tmp_path / "run", STUCK=str(stuck), **limits)
  begun = time.monotonic()
  logs = processes.finish(started, tmp_path / "run", codes=(75, 75))
  assert time.monotonic() - begun < 20
  for index, log in enumerate(logs):
    assert "rounds.py:" in log.partition(f"process {index} stands at\n")[2]
    (said,) = [line for line in log.splitlines() if "vlp_jax: error" in line]
    assert (
      f"process {stuck} (" in said and ") is waited for: nobody has gone on for" in said
    )
    other = f"process {1 - stuck} trains (2 batches so far) and waits for others"
    assert "s it trains (1 batches so far), " in said
    assert f"{other}: do its data come?" in said
    assert "the same command on all goes on from the last checkpoint" in said


ALONE = """
  import os, threading
  from vlp_jax.training import course, distributed
  distributed.LEAVE = 1.0
  limits = dict(VLP_JAX_HANG_TIMEOUT="0.4", VLP_JAX_STALL_TIMEOUT="0.5")
  with distributed.joined(limits):
    for _ in range({rounds}):
      course.go_on()
      threading.Event().wait(0.05)
    if {logs_hang}:
      # The log is full, and nobody reads it.
      os.set_blocking(2, False)
      try:
        while True:
          os.write(2, bytes(4096))
      except BlockingIOError:
        os.set_blocking(2, True)
    with course.at("saves", "step 5"):
      if {hangs}:
        threading.Event().wait()
"""


def alone(**fields):
  """A process that is alone, with a pipe as its log."""
  code = textwrap.dedent(ALONE.format(**dict(rounds=1, logs_hang=False) | fields))
  return subprocess.Popen(
    [sys.executable, "-c", code], cwd=runs.ROOT, stderr=subprocess.PIPE, text=True
  )


def test_one_that_is_alone_hangs():
  process = alone(hangs=True)
  _, log = process.communicate(timeout=60)
  assert process.returncode == 75, log
  assert f"pid {process.pid}) is waited for: nobody has gone on for " in log
  assert " s it saves step 5: does its disk or its store answer?" in log
  assert "). So it stops, with exit code 75: the same command on all goes on" in log
  assert log.count("vlp_jax: error") == 1 and "process 0 stands at\n  " in log


def test_one_that_is_alone_and_starts_or_ends_does_not_hang():
  process = alone(hangs=False, rounds=30)  # longer than the limit
  _, log = process.communicate(timeout=60)
  assert (process.returncode, log) == (0, "")


def test_it_leaves_though_its_log_hangs_as_well():
  with alone(hangs=True, logs_hang=True) as process:
    assert process.wait(timeout=60) == 75


def test_a_limit_that_is_none(tmp_path):
  started = processes.start(tmp_path / "run", only=(0,), VLP_JAX_HANG_TIMEOUT="soon")
  (log,) = processes.finish(started, tmp_path / "run", codes=(2,))
  assert "VLP_JAX_HANG_TIMEOUT='soon': want seconds." in log


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_mistake_of_one_ends_both(tmp_path, wrong):
  started = rounds(tmp_path / "run", MISTAKE=str(wrong))
  logs = processes.finish(started, tmp_path / "run", codes=(2, 2))
  assert logs[wrong].count("vlp_jax: error: VLP_JAX_COORDINATOR without") == 1
  told = ") stopped: ValueError: VLP_JAX_COORDINATOR without"
  assert f"vlp_jax: error: process {wrong} (" in logs[1 - wrong]
  assert told in logs[1 - wrong]
  assert "Traceback" not in "".join(logs)


def test_a_mistake_of_all_is_told_by_all(tmp_path):
  started = rounds(tmp_path / "run", MISTAKE="all")
  for log in processes.finish(started, tmp_path / "run", codes=(2, 2)):
    assert log.count("vlp_jax: error: VLP_JAX_COORDINATOR without") == 1


def lines(workdir, steps):
  """Of metrics.jsonl: a line a step, and those of the evaluations at the end."""
  found = runs.metrics(workdir)
  trained, rest = found[:steps], found[steps:]
  assert [line["step"] for line in trained] == list(range(1, steps + 1))
  assert all(line["step"] == steps for line in rest)
  return trained, rest


@pytest.mark.slow
def test_a_killed_run_goes_on_and_equals_one_process(tmp_path):
  """On the same mesh of two devices: of one process, and of two with one each."""
  steps = 16
  config = f"{runs.CONFIG}:{steps}"
  data = {"source": {"split": "val", "size": 40}, "pp": "decode"}
  evals = {name: {"data": data} for name in ("retrieval", "itm", "mlm")}
  evals["retrieval"]["rerank"] = 4
  options = (f"--config.evals={evals}",)
  alone = tmp_path / "alone"
  runs.finish(runs.start(alone, *options, config=config, devices=2), alone)
  two = tmp_path / "two"
  started = processes.start(two, *options, config=config)
  wait_for(lambda: runs.steps(two), started)
  started[1].kill()
  begun = time.monotonic()
  log, _ = processes.finish(started, two, codes=(75, -signal.SIGKILL))
  assert time.monotonic() - begun < 60
  assert "is gone, without a word" in log
  killed_at = runs.steps(two)[-1]

  started = processes.start(two, *options, config=config)
  log, other = processes.finish(started, two)
  assert f"goes on from step {killed_at}" in log
  assert "2 x cpu, mesh 2x1x1" in log
  assert "step" not in other  # one process alone tells and writes
  (got, ended), (want, ended_alone) = (lines(run, steps) for run in (two, alone))
  assert ended == ended_alone and len(ended) == len(evals)
  for line, other in zip(got, want, strict=True):
    for name in ("loss", "itc", "itm", "mlm"):
      assert abs(line[name] - other[name]) <= LOSS_TOLERANCE * abs(other[name]), (
        line["step"],
        name,
      )
  # Ranks and words, which hang on what is larger: the same to the last one.
  got, want = (json.loads((w / "results.json").read_text()) for w in (two, alone))
  assert set(got) == set(evals)
  assert got == want
  assert (two / "report.html").is_file()
