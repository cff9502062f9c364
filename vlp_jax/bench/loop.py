"""What the trainer's loop takes of a step: the loop around a step that does nothing."""

import contextlib
import json
import pathlib
import tempfile
from typing import Any
from unittest import mock

import jax.numpy as jnp

from vlp_jax import card as card_lib
from vlp_jax import config_file
from vlp_jax.ops import reduce
from vlp_jax.training import step as step_lib

STEPS = 400
# The loop's work does not depend on the model, but for the number of metrics.
CONFIG = "albef.py:tiny"


def overhead(step_seconds: float, *, steps: int = STEPS) -> dict[str, Any]:
  """Milliseconds of the loop's own work a step, and their share of a step.

  `loop.train` runs as it is, data pipeline, logging and all, with a step that only
  counts; from the time of a step the waiting for data is taken off.
  """
  # Here: the loop needs TensorFlow, and the rest of `bench step` does not.
  from vlp_jax import loop

  given = config_file.load(str(card_lib.folder() / CONFIG))
  given.total = f"{steps} steps"
  given.evals, given.checkpoint = {}, {"every": "100%"}
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    stack.enter_context(mock.patch.object(step_lib, "make_train_step", _counting))
    stack.enter_context(mock.patch.object(loop, "_report", lambda *_, **__: None))
    loop.train(given, pathlib.Path(folder))
    lines = (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  rows = [row for row in rows if "examples_per_second" in row][1:]
  own = [
    given.batch_size / row["examples_per_second"] * (1 - row["input_wait"])
    for row in rows
  ]
  best = min(own)
  return {"ms_per_step": 1e3 * best, "share_of_step": best / step_seconds}


def _counting(pretrainer, tx, *, schedule, **_):
  """In the place of `make_train_step`: the same metrics, and no computation."""
  del tx

  def step(state: Any, batch: Any) -> tuple[Any, dict[str, reduce.Mean]]:
    del batch
    one = reduce.Mean(jnp.float32(1.0), jnp.float32(1.0))
    names = [f"{name}/{i}" for name in pretrainer.objectives for i in range(4)]
    rate = reduce.Mean(jnp.float32(schedule(state.step)), jnp.float32(1.0))
    metrics = dict.fromkeys(["loss", "grad_norm", *names], one)
    return state.replace(step=state.step + 1), metrics | {"learning_rate": rate}

  return step
