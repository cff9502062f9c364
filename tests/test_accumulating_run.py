"""A run in microbatches, streamed from the host, writes the log of a plain run."""

import numpy as np
import pytest

from tests import processes
from tests import runs

ITC = (
  "objectives.itm=None",
  "objectives.mlm=None",
  "objectives.itc.queue=0",
  "objectives.itc.distill=0.0",
  "ema_decay=None",
  "model.fusion=None",
  "model.image.dropout=0.0",
  "model.text.dropout=0.0",
  "total=3",
  "optim.warmup=1",
)


MICROBATCHES = (
  "accumulate=2",
  "accumulate_stream=True",
  "objectives.itc.backend='ring'",
)


pytestmark = pytest.mark.slow


def options(mesh, *more):
  items = (*ITC, f"sharding.mesh={{'{mesh}': 2}}", *more)
  return [f"--config.{item}" for item in items]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  folder = tmp_path_factory.mktemp("plain") / "run"
  runs.finish(runs.start(folder, *options("data"), devices=2), folder)
  return runs.metrics(folder)


def check(folder, plain):
  lines = runs.metrics(folder)
  assert [line.keys() for line in lines] == [line.keys() for line in plain]
  for line, other in zip(plain, lines, strict=True):
    for key, value in line.items():
      np.testing.assert_allclose(other[key], value, rtol=1e-4, err_msg=key)


@pytest.mark.parametrize("mesh", ["data", "fsdp"])
def test_the_log_is_that_of_a_plain_run(mesh, plain, tmp_path):
  folder = tmp_path / "run"
  runs.finish(runs.start(folder, *options(mesh, *MICROBATCHES), devices=2), folder)
  check(folder, plain)


def test_two_processes_sum_their_gradients_at_the_end(plain, tmp_path):
  folder = tmp_path / "run"
  started = processes.start(folder, *options("data", *MICROBATCHES))
  processes.finish(started, folder)
  check(folder, plain)
