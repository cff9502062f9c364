"""Whole runs in processes of their own, and what they leave in their workdirs."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = ROOT / "tests" / "configs_for_tests" / "scenes.py"

# Of CONFIG, for ITC alone: its step is soon compiled.
ITC = (
  "objectives.itm=None",
  "objectives.mlm=None",
  "objectives.itc.queue=0",
  "objectives.itc.distill=0.0",
  "ema_decay=None",
  "model.fusion=None",
)

# What tells of time and not of training.
RATES = ("examples_per_second", "input_wait")


def xla_flags(devices: int) -> str:
  """What this process was given, and so many devices."""
  given = os.environ.get("XLA_FLAGS", "")
  return f"{given} --xla_force_host_platform_device_count={devices}"


def start(
  workdir: pathlib.Path, *options: str, config: str = str(CONFIG), devices: int = 1
) -> subprocess.Popen:
  """Starts `python -m vlp_jax.train`; its output goes to WORKDIR.log."""
  flags = xla_flags(devices)
  argv = [sys.executable, "-m", "vlp_jax.train", f"--config={config}"]
  with open(f"{workdir}.log", "a", encoding="utf-8") as log:
    return subprocess.Popen(
      [*argv, f"--workdir={workdir}", *options],
      cwd=ROOT,
      env=os.environ | {"XLA_FLAGS": flags},
      stdout=log,
      stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen, workdir: pathlib.Path, code: int = 0) -> str:
  """What the run printed; it must end with `code`, and is killed if it does not end."""
  try:
    got = process.wait(timeout=300)
  finally:
    if process.poll() is None:
      process.kill()
      process.wait()
  text = pathlib.Path(f"{workdir}.log").read_text("utf-8")
  assert got == code, f"exit code {got}, wants {code}:\n{text[-3000:]}"
  return text


def metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Lines of metrics.jsonl that are whole, without times."""
  path = workdir / "metrics.jsonl"
  text = path.read_text("utf-8") if path.exists() else ""
  lines = [json.loads(line) for line in text.split("\n")[:-1]]
  return [{k: v for k, v in line.items() if k not in RATES} for line in lines]


def steps(workdir: pathlib.Path) -> list[int]:
  """Steps of the checkpoints that are whole."""
  folder = workdir / "checkpoints"
  return sorted(int(f.name) for f in folder.glob("*") if f.name.isdigit())


def state(workdir: pathlib.Path, step: int | None = None) -> dict[str, np.ndarray]:
  """{path: array} of a checkpoint, of the newest one if none is named."""
  step = steps(workdir)[-1] if step is None else step
  path = workdir / "checkpoints" / str(step) / "state"
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    tree = reader.metadata(path).item_metadata.tree
    plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    found = reader.restore(path, ocp.args.PyTreeRestore(restore_args=plain))
  leaves, _ = jax.tree_util.tree_flatten_with_path(found)
  return {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in leaves}
