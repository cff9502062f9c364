"""Runs of two processes, of which one gets stuck: all leave, and the run goes on."""

import time

import pytest

from tests import processes
from tests import runs

STUCK = "tests.training.stuck"
STEPS, SAVED, EVALUATED = 8, 3, 4
DATA = {"source": {"split": "val", "size": 40}, "pp": "decode"}
OPTIONS = (
  *(f"--config.{option}" for option in runs.ITC),
  f"--config.checkpoint.every={SAVED}",
  f"--config.evals={dict(retrieval=dict(data=DATA, every=EVALUATED))}",
)
CONFIG = f"{runs.CONFIG}:{STEPS}"
# Seconds; the evaluation compiles in less. Signs of life are given every 5 seconds: one
# to know that it does not go on, one to see that it has not, and some to leave.
LIMIT, MARGIN = 40, 20
LIMITS = dict(VLP_JAX_HANG_TIMEOUT="20", VLP_JAX_STALL_TIMEOUT=str(LIMIT))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """Lines of metrics.jsonl of the run of two processes."""
  workdir = tmp_path_factory.mktemp("undisturbed") / "run"
  processes.finish(processes.start(workdir, *OPTIONS, config=CONFIG), workdir)
  return by_name(workdir)


def by_name(workdir):
  """{(step, name): value} of all that was logged."""
  lines = runs.metrics(workdir)
  return {(x["step"], name): value for x in lines for name, value in x.items()}


SAVES = f"saves step {STEPS}"


@pytest.mark.slow
@pytest.mark.parametrize(
  ("index", "where", "mine", "other"),
  [
    # The next save waits until the one before is written.
    (1, "written", f"{SAVES} and has not written its part of step 6", SAVES),
    (0, "written", f"{SAVES} and has not written its part of step 6", SAVES),
    (1, "save", "saves step 6", "saves step 6 and waits for others"),
    (
      1,
      "evaluation",
      "evaluates retrieval after step 4 (1 batches so far)",
      "evaluates retrieval after step 4 (",
    ),
  ],
)
def test_one_is_stuck(tmp_path, undisturbed, index, where, mine, other):
  workdir = tmp_path / "run"
  begin = dict(config=CONFIG, module=STUCK, STUCK=f"{index} {where}", **LIMITS)
  started = processes.start(workdir, *OPTIONS, **begin)
  try:
    until = time.monotonic() + 240
    while "is stuck" not in processes.log(workdir, index):
      assert time.monotonic() < until and all(p.poll() is None for p in started)
      time.sleep(0.1)
  except BaseException:
    processes.finish(started, workdir, (75, 75), timeout=0.1)
    raise
  begun = time.monotonic()
  logs = processes.finish(started, workdir, (75, 75))
  assert LIMIT - 1 < time.monotonic() - begun < LIMIT + MARGIN
  for i, log in enumerate(logs):
    (said,) = [line for line in log.splitlines() if "vlp_jax: error" in line]
    assert f"error: process {index} (" in said
    assert f"pid {started[index].pid}) is waited for: nobody has gone on for" in said
    assert f"s it {mine}, process {1 - index} {other}" in said
    assert "(VLP_JAX_STALL_TIMEOUT). So " in said
    assert "the same command on all goes on from the last checkpoint" in said
    stands = log.partition(f"process {i} stands at\n")[2].splitlines()
    assert len(stands) > 5 and all(":" in line for line in stands)
    if i == index and where != "written":
      assert any("stuck.py:" in x and x.endswith(" hang") for x in stands), stands
  assert runs.steps(workdir) == [SAVED]

  started = processes.start(workdir, *OPTIONS, config=CONFIG)
  log, _ = processes.finish(started, workdir)
  assert f"goes on from step {SAVED}" in log
  assert by_name(workdir) == undisturbed
