"""A run in microbatches, streamed from the host, writes the log of a plain run."""

import numpy as np
import pytest

from tests import runs
from vlp_jax import train

ITC = (
  "objectives.itm=None",
  "objectives.mlm=None",
  "objectives.itc.queue=0",
  "objectives.itc.distill=0.0",
  "ema_decay=None",
  "model.fusion=None",
  "model.image.dropout=0.0",
  "model.text.dropout=0.0",
  "sharding.mesh={'data': 4, 'fsdp': 2}",
  "total=3",
)


def trained(workdir, *overrides):
  options = [f"--config.{item}" for item in (*ITC, *overrides)]
  with pytest.raises(SystemExit) as stopped:
    train.main([f"--config={runs.CONFIG}", *options, f"--workdir={workdir}"])
  assert stopped.value.code == 0
  return runs.metrics(workdir)


def test_the_log_is_that_of_a_plain_run(tmp_path):
  plain = trained(tmp_path / "plain")
  streamed = trained(
    tmp_path / "streamed",
    "accumulate=2",
    "accumulate_stream=True",
    "objectives.itc.backend='ring'",
  )
  assert [line.keys() for line in plain] == [line.keys() for line in streamed]
  for line, other in zip(plain, streamed, strict=True):
    for key, value in line.items():
      np.testing.assert_allclose(other[key], value, rtol=1e-4, err_msg=key)
