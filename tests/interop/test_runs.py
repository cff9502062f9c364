"""Checkpoints of runs are written in the official layouts, bit by bit."""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax import convert
from vlp_jax.interop import reader
from vlp_jax.training import checkpoint
from vlp_jax.training import step as step_lib

REFERENCE = pathlib.Path(__file__).parent.parent / "reference"
HEADS = {
  "vilt": dict(num_heads=4),
  "vlp": dict(num_heads=4),
}


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_a_run_without_queues_is_written(name, averaged, tmp_path):
  """Where the run has averages too, the format has no place for them."""
  path = REFERENCE / name / "weights.safetensors"
  module = importlib.import_module(f"vlp_jax.interop.{name}")
  params = module.load(path, **HEADS[name]).params
  state = step_lib.TrainState(
    step=np.int32(3),
    params=params,
    opt_state={"mu": {"x": np.zeros(2, np.float32)}},
    ema=params if averaged else None,
    memory={},
  )
  checkpoints = checkpoint.Checkpoints(tmp_path / "run" / "checkpoints")
  checkpoints.save(3, jax.tree.map(jnp.asarray, state), {"position": 1}, {})
  checkpoints.finish()
  out = tmp_path / "theirs.safetensors"
  convert.main(["--weights", str(tmp_path / "run"), "--to", name, "--out", str(out)])
  want, got = reader.load(path), reader.load(out)
  assert got.keys() == want.keys()
  for key, x in want.items():
    assert got[key].dtype == x.dtype and got[key].tobytes() == x.tobytes(), key
