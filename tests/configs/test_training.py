"""Every config's `:tiny` trains, by its command: 200 steps bring the loss into a band.

The bands are recorded in bands.json: the mean loss of the first and of the last steps
when it was written, and the bound that the last ones have to stay under. After a change
that is meant: UPDATE_BANDS=1 pytest -m slow tests/configs/test_training.py.
"""

import json
import math
import os
import pathlib

import jax
import numpy as np
import pytest

from tests import runs
from tests.configs import test_all
from vlp_jax import train
from vlp_jax.training import sharding

BANDS = pathlib.Path(__file__).parent / "bands.json"
STEPS = 200
SEEN = 20  # steps of a mean
# Of what the loss has come down, so much may come up again: rounding differs between
# processors, and small models amplify it.
SLACK = 0.25
# ALBEF again, on data that has to be prepared first.
PREPARED = ("quickstart", "flickr8k")
NAMES = [name for name in test_all.NAMES if name not in PREPARED]
# Loss of a guess by how frequent each answer is, where the loss is the task's alone. A
# band that is near to it would say nothing.
GUESS = {
  "finetune/albef_nlvr": math.log(2),
  "finetune/albef_ve": math.log(3),
  "finetune/blip_nlvr": math.log(2),
  "finetune/meter_nlvr": math.log(2),
  "finetune/meter_retrieval": math.log(4),
  "finetune/vilt_nlvr": math.log(2),
  "finetune/vilt_retrieval": math.log(4),
  # Of three pairs, one is a match.
  "late_fusion": math.log(3) - 2 / 3 * math.log(2),
}
CLEARLY = 0.98  # of a guess's loss


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  """As on a laptop: the mesh of eight that tests have is slow for batches of 16."""
  make, first = sharding.make_mesh, jax.devices()[:1]
  monkeypatch.setattr(sharding, "make_mesh", lambda given: make(given, first))


def run(name, workdir, *options):
  config = f"{test_all.ROOT}/configs/{name}.py:tiny"
  options = ["--config.log.every=1", "--config.log.tensorboard=False", *options]
  with pytest.raises(SystemExit) as ended:
    train.main([f"--config={config}", f"--workdir={workdir}", *options])
  assert ended.value.code == 0
  return [line["loss"] for line in runs.metrics(workdir)]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps(name, tmp_path):
  losses = run(name, tmp_path / "run", "--config.total=2")
  assert len(losses) == 2 and np.isfinite(losses).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_200_steps(name, tmp_path):
  workdir = tmp_path / "run"
  options = (f"--config.total={STEPS}", "--config.optim.lr=1e-3")
  losses = run(name, workdir, *options)
  assert len(losses) == STEPS
  first, last = sum(losses[:SEEN]) / SEEN, sum(losses[-SEEN:]) / SEEN
  bands = json.loads(BANDS.read_text("utf-8"))
  if os.environ.get("UPDATE_BANDS", "0") not in ("", "0"):
    below = last + SLACK * (first - last)
    bands[name] = {
      k: round(v, 3)
      for k, v in zip(("first", "last", "below"), (first, last, below), strict=True)
    }
    text = json.dumps(dict(sorted(bands.items())), indent=2)
    BANDS.write_text(text + "\n", "utf-8")
  band = bands[name]
  assert band["below"] < min(band["first"], CLEARLY * GUESS.get(name, math.inf))
  assert last < band["below"]
  # What is in the workdir is whole: it is restored, and there is nothing left to do.
  assert run(name, workdir, *options) == losses
