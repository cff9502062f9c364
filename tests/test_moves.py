"""A run that moves: to other devices, processes or meshes; stopped together first."""

import shutil
import signal
import time

import numpy as np
import pytest

from tests import processes
from tests import runs
from vlp_jax import config_file
from vlp_jax import loop

STEPS, MOVED = 12, 6
# Moves of float32 sums between meshes, which Adam then divides by small moments.
LOSS_TOLERANCE = 1e-5
LOSSES = ("loss", "itc", "itm", "mlm")


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
  """The workdir of a run on the eight devices of this process; it keeps all."""
  workdir = tmp_path_factory.mktemp("eight") / "run"
  config = config_file.load(f"{runs.CONFIG}:{STEPS}", ["checkpoint.keep=10"])
  assert loop.train(config, workdir) == 0
  return workdir


def moved(eight, workdir):
  """A copy of it as it was at step MOVED."""
  shutil.copytree(eight, workdir)
  for step in runs.steps(workdir):
    if step > MOVED:
      shutil.rmtree(workdir / "checkpoints" / str(step))
  return workdir


def assert_goes_on_alike(workdir, other):
  """The same examples in the same order, and losses within the tolerance."""
  # The queue holds the image ids of all steps in their order.
  got, want = runs.state(workdir), runs.state(other)
  np.testing.assert_array_equal(
    got["memory/objectives_itc/id_queue"], want["memory/objectives_itc/id_queue"]
  )
  assert len(set(want["memory/objectives_itc/id_queue"].tolist())) > 100
  got, want = runs.metrics(workdir), runs.metrics(other)
  assert [line["step"] for line in got] == list(range(1, STEPS + 1))
  for line, same in zip(got, want, strict=True):
    assert line["examples"] == same["examples"]
    for name in LOSSES:
      off = abs(line[name] - same[name])
      assert off <= LOSS_TOLERANCE * abs(same[name]), (line["step"], name)


@pytest.mark.parametrize(
  ("devices", "mesh"),
  [
    (4, "4x1x1"),
    pytest.param(8, "2x2x2", marks=pytest.mark.slow),
    pytest.param(8, "1x8x1", marks=pytest.mark.slow),
    pytest.param(1, "1x1x1", marks=pytest.mark.slow),
  ],
)
def test_to_other_devices_and_meshes(eight, tmp_path, devices, mesh):
  workdir = moved(eight, tmp_path / "run")
  data, fsdp, tensor = map(int, mesh.split("x"))
  options = [f"--config.sharding.mesh={dict(data=data, fsdp=fsdp, tensor=tensor)}"]
  process = runs.start(
    workdir, *options, config=f"{runs.CONFIG}:{STEPS}", devices=devices
  )
  log = runs.finish(process, workdir)
  assert f"goes on from step {MOVED}" in log
  assert f"{devices} x cpu, mesh {mesh}" in log
  assert_goes_on_alike(workdir, eight)


@pytest.mark.slow
def test_to_two_processes_which_stop_together(eight, tmp_path):
  """Each has a device; one is told to stop, both save the same step, and go on."""
  workdir = moved(eight, tmp_path / "run")
  options = ["--config.checkpoint.keep=10"]
  config = f"{runs.CONFIG}:{STEPS}"
  started = processes.start(workdir, *options, config=config)
  # Before it begins: it stops at its first chance, which takes steps.
  until(lambda: "goes on from step" in processes.log(workdir, 0), started)
  started[1].send_signal(signal.SIGTERM)
  code = 128 + signal.SIGTERM
  logs = processes.finish(started, workdir, (code, code))
  stopped = runs.steps(workdir)[-1]
  assert MOVED < stopped < STEPS
  assert f"stopped by SIGTERM (process 1) at step {stopped}" in logs[0]
  assert runs.metrics(workdir)[-1]["step"] == stopped

  started = processes.start(workdir, *options, config=config)
  log = processes.finish(started, workdir)[0]
  assert f"goes on from step {stopped}" in log
  assert "2 x cpu, mesh 2x1x1" in log
  assert_goes_on_alike(workdir, eight)


def until(condition, started):
  end = time.monotonic() + 120
  while not condition():
    assert time.monotonic() < end and all(p.poll() is None for p in started)
    time.sleep(0.05)
