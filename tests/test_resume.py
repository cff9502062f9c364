"""A run that was killed or stopped is the run that was not."""

import json
import random
import re
import shutil
import signal
import time

import pytest

from tests import runs
from vlp_jax import config_file
from vlp_jax import loop

STEPS = 60
KILLS = 12
SEED = 0  # its kills come within 53 steps, wherever they come


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The workdir of a run that nothing interrupts."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  runs.finish(start(workdir), workdir)
  return workdir


def start(workdir, *options):
  return runs.start(workdir, *options, config=f"{runs.CONFIG}:{STEPS}")


def assert_same(workdir, other):
  """Bit for bit: parameters, optimiser, teacher, queues; and every number logged."""
  got, want = runs.state(workdir), runs.state(other)
  assert got.keys() == want.keys()
  for part in ("params/", "opt_state/", "ema/", "memory/"):
    assert any(path.startswith(part) for path in want), part
  different = [p for p in want if got[p].tobytes() != want[p].tobytes()]
  assert not different
  assert runs.metrics(workdir) == runs.metrics(other)
  assert len(runs.metrics(workdir)) == STEPS
  results = [json.loads((w / "results.json").read_text()) for w in (workdir, other)]
  assert results[0] == results[1]


def test_killed_at_any_moment(whole, tmp_path):
  workdir = tmp_path / "run"
  rng = random.Random(SEED)
  saving, begins = 0, []
  for moment in ["saving", "starting", "stepping"] * (KILLS // 3):
    process = start(workdir)
    kill_when(moment, process, workdir, rng)
    if process.wait() != -signal.SIGKILL:
      break
    begins.append(max(runs.steps(workdir), default=0))
    saving += bool(unfinished(workdir))
  log = runs.finish(start(workdir), workdir)
  assert len(begins) >= 10, f"it ended after {begins}: make the run longer\n{log}"
  assert saving >= 2, "no kill came during a save"
  assert re.search(r"goes on from step \d+", log)
  assert not unfinished(workdir)
  assert_same(workdir, whole)
  assert len(set(begins)) > 3, f"the kills came at few places: {begins}"


def unfinished(workdir):
  """Folders of saves that are under way, or that a kill has left."""
  return set((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def kill_when(moment, process, workdir, rng):
  """Kills the process at the moment, unless it ends before."""
  share, saves, lines = rng.random(), rng.randint(1, 3), rng.randint(4, 10)
  begun = time.monotonic()
  # At its start the run cuts the lines beyond its checkpoint, and removes what is left
  # of saves: what is new between two looks is its own.
  before, written, saved, grown = unfinished(workdir), length(workdir), 0, 0
  while process.poll() is None:
    folders, now = unfinished(workdir), length(workdir)
    saved, before = saved + len(folders - before), folders
    grown, written = grown + (now > written), now
    if moment == "saving" and saved >= saves:
      time.sleep(share * 0.03)
      break
    if moment == "stepping" and grown >= lines:
      break
    if moment == "starting" and (grown or time.monotonic() - begun > share * 8):
      break
    time.sleep(0.003)
  process.kill()


def length(workdir):
  path = workdir / "metrics.jsonl"
  return path.stat().st_size if path.exists() else 0


@pytest.mark.slow
def test_stopped_by_a_signal(whole, tmp_path):
  workdir = tmp_path / "run"
  process = start(workdir)
  while len(runs.metrics(workdir)) < 4 and process.poll() is None:
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  log = runs.finish(process, workdir, code=128 + signal.SIGTERM)
  step = runs.metrics(workdir)[-1]["step"]
  assert 4 <= step < STEPS
  assert runs.steps(workdir)[-1] == step
  assert f"stopped by SIGTERM at step {step}" in log
  runs.finish(start(workdir), workdir)
  assert_same(workdir, whole)


@pytest.mark.slow
def test_killed_while_it_evaluates(tmp_path):
  """What is saved before an evaluation owes it: the run that goes on makes it first."""
  val = {
    "type": "losses",
    "every": 3,
    "data": {
      "pp": "decode|resize(24)",
      "source": {"type": "scenes", "split": "val", "size": 16, "res": 24},
    },
  }
  options = [*runs.ITC, "checkpoint.keep=10", f"evals.val={val}"]
  config = config_file.load(f"{runs.CONFIG}:6", options)
  workdir, killed = tmp_path / "run", tmp_path / "killed"
  assert loop.train(config, workdir) == 0
  shutil.copytree(workdir, killed)
  shutil.rmtree(killed / "checkpoints" / "6")
  log = killed / "metrics.jsonl"
  lines = log.read_text().splitlines(keepends=True)
  (first,) = [
    i for i, line in enumerate(lines) if "val/" in line and '"step": 3' in line
  ]
  log.write_text("".join(lines[:first]))
  assert loop.train(config, killed) == 0
  assert runs.metrics(killed) == runs.metrics(workdir)
  assert (killed / "results.json").read_text() == (workdir / "results.json").read_text()


def test_the_workdir_says_what_ran(whole):
  saved = config_file.load(str(whole / "config.json"))
  assert saved == config_file.load(f"{runs.CONFIG}:{STEPS}")
  assert (whole / "report.html").is_file()
