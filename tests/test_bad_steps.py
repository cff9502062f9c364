"""Whole runs that meet bad batches: left out, gone back from, or the end of it."""

import functools
import math
import shutil

import numpy as np
import pytest
import tensorflow as tf

from tests import runs
from vlp_jax import config_file
from vlp_jax import loop
from vlp_jax.data import shuffle
from vlp_jax.data.sources import scenes

BATCH, SIZE, TOTAL, SAVED = 16, 640, 24, 3  # 40 steps an epoch
BAD = 11  # the first step that meets it
POISON = "tests.configs_for_tests.poison:Objective"
OPTIONS = (
  *runs.ITC,
  f"total={TOTAL}",
  f"checkpoint.every={SAVED}",
  "checkpoint.keep=100",
  f"data.source.size={SIZE}",
)


@functools.cache
def bad_image():
  """An image of step BAD, and of no other of the first epoch."""
  source = scenes.Source(split="train", size=SIZE, res=24)
  positions = tf.range(SIZE, dtype=tf.int64)
  order = shuffle.shuffled(positions, SIZE, 0)
  ids = np.array([each["image_id"] for each in source.read(order)])
  names, counts = np.unique(ids, return_counts=True)
  own = ids[(BAD - 1) * BATCH : BAD * BATCH]
  return int(next(name for name in own if counts[names == name] == 1))


def train(workdir, *overrides, value="nan"):
  poison = {"type": POISON, "image_id": bad_image(), "value": value}
  options = [*OPTIONS, f"objectives.poison={poison}", *overrides]
  return loop.train(config_file.load(str(runs.CONFIG), options), workdir)


def lines(workdir):
  return {line["step"]: line for line in runs.metrics(workdir)}


def assert_resumes_alike(workdir, tmp_path, step, *overrides, value="nan"):
  """The run, killed after the checkpoint of `step`, ends in the same bits."""
  again = tmp_path / "again"
  shutil.copytree(workdir, again)
  for other in runs.steps(again):
    if other > step:
      shutil.rmtree(again / "checkpoints" / str(other))
  train(again, *overrides, value=value)
  got, want = runs.state(again), runs.state(workdir)
  assert got.keys() == want.keys()
  assert not [path for path in want if got[path].tobytes() != want[path].tobytes()]
  assert runs.metrics(again) == runs.metrics(workdir)


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_left_out(tmp_path, caplog):
  policy = ("guard={'nonfinite': 'skip', 'most': 3}",)
  assert train(tmp_path / "run", *policy) == 0
  assert f"step {BAD}: the loss or its gradient is not finite" in caplog.text
  told = lines(tmp_path / "run")
  assert sorted(told) == list(range(1, TOTAL + 1))
  assert told[BAD]["loss"] is None and told[BAD]["poison"] is None
  assert math.isfinite(told[BAD + 1]["loss"])
  assert [told[s]["guard/nonfinite"] for s in (BAD - 1, BAD, TOTAL)] == [0, 1, 1]
  state = runs.state(tmp_path / "run")
  assert all(np.isfinite(value).all() for value in state.values())
  assert int(state["step"]) == TOTAL and int(state["guard/last"]) == BAD
  (count,) = {int(v) for path, v in state.items() if path.endswith("/count")}
  assert count == TOTAL - 1
  # From before it; the guard's counts are in the state.
  assert_resumes_alike(tmp_path / "run", tmp_path, 9, *policy)


@pytest.mark.slow
def test_a_spike_rolls_back_and_jumps_the_data(tmp_path, caplog):
  policy = (
    "guard={'spike': 'roll_back', 'window': 5, 'loss_sigmas': 1e3,"
    " 'norm_factor': None}",
    "log.every=2",
  )
  assert train(tmp_path / "run", *policy, value=1e6) == 0
  assert f"step {BAD}: the loss or its gradient leaps up" in caplog.text
  told = lines(tmp_path / "run")
  assert sorted(told) == list(range(2, TOTAL + 1, 2))
  # From the checkpoint of step 9, on after the data of step 11.
  jumped = (BAD - 9) * BATCH
  for step, line in told.items():
    assert line["examples"] == step * BATCH + (jumped if step > 9 else 0)
    assert line["guard/spikes"] == 0 and line["loss"] < 100
  # It goes back once more, from the same checkpoint to the same data.
  assert_resumes_alike(tmp_path / "run", tmp_path, 9, *policy, value=1e6)


@pytest.mark.slow
def test_a_run_that_goes_back_to_its_beginning(tmp_path):
  policy = ("guard={'nonfinite': 'roll_back'}", "checkpoint.every=100", "log.every=4")
  assert train(tmp_path / "run", *policy) == 0
  told = lines(tmp_path / "run")
  assert told[4]["examples"] == (4 + BAD) * BATCH
  assert sorted(told) == list(range(4, TOTAL + 1, 4))
  assert runs.steps(tmp_path / "run") == [0, TOTAL]


@pytest.mark.slow
def test_too_many_bad_steps_end_the_run(tmp_path):
  policy = ("guard={'nonfinite': 'roll_back', 'most': 1}", "total=90")
  with pytest.raises(
    FloatingPointError, match=r"step \d+: 2 times back, and guard.most=1.*kept: step"
  ):
    train(tmp_path / "run", *policy)


@pytest.mark.slow
def test_a_spike_may_stop_the_run(tmp_path):
  policy = ("guard={'spike': 'stop', 'window': 5, 'loss_sigmas': 1e3}", "log.every=4")
  with pytest.raises(
    FloatingPointError, match=rf"step {BAD}: bad, .*to stop. .*is kept: step 9\."
  ):
    train(tmp_path / "run", *policy, value=1e6)
  assert runs.steps(tmp_path / "run")[-1] == 9
