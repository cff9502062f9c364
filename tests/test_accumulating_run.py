"""A run in microbatches, streamed from the host, writes the log of a plain run."""

import numpy as np
import pytest

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
  "sharding.mesh={'fsdp': 2}",
  "total=3",
  "optim.warmup=1",
)


MICROBATCHES = (
  "accumulate=2",
  "accumulate_stream=True",
  "objectives.itc.backend='ring'",
)


@pytest.mark.slow
def test_the_log_is_that_of_a_plain_run(tmp_path):
  kinds = {"plain": (), "streamed": MICROBATCHES}
  started = {}
  for name, more in kinds.items():
    options = [f"--config.{item}" for item in (*ITC, *more)]
    started[name] = runs.start(tmp_path / name, *options, devices=2)
  logs = []
  for name, process in started.items():
    runs.finish(process, tmp_path / name)
    logs.append(runs.metrics(tmp_path / name))
  assert [line.keys() for line in logs[0]] == [line.keys() for line in logs[1]]
  for line, other in zip(*logs, strict=True):
    for key, value in line.items():
      np.testing.assert_allclose(other[key], value, rtol=1e-4, err_msg=key)
