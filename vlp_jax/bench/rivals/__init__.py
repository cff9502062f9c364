"""PyTorch models of the same sizes, each a process of its own.

The file is the registry. It needs torch and what its name says, and of ours no more
than this folder and `bench/timing.py`: another interpreter may run it. Each is a module
that maps a batch to its loss, and the batch.
"""

import difflib
import json
import os
import pathlib
from typing import Any

from vlp_jax import memory
from vlp_jax.bench import timing

SHARED = ("__init__", "layers", "training")


def names() -> list[str]:
  """The rivals that there are."""
  here = pathlib.Path(__file__).parent
  return sorted(f.stem for f in here.glob("*.py") if f.stem not in SHARED)


def start(
  name: str,
  job: Any,
  *,
  python: str | None = None,
  compiled: bool = False,
  steps: int = 1,
) -> timing.Child:
  """The process of a rival, of the sizes of a job; `about` waits for its start.

  Args:
    name: a file of this folder. job: a `job.Job`.
    python: an interpreter that has its packages. compiled: by torch.compile.
    steps: of a round; the time is that of one.

  Raises:
    ValueError: there is no such rival.
  """
  if name not in names():
    near = difflib.get_close_matches(name, names(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(
      f"bench step: --against={name}: no such rival{hint} There are"
      f" {', '.join(names())}."
    )
  said = json.dumps(sizes(job) | {"compiled": compiled, "steps": steps})
  root = str(pathlib.Path(__file__).parents[3])
  paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
  argv = ["-m", f"{__name__}.{name}", said]
  env = {"PYTHONPATH": paths} | memory.as_it_comes()
  return timing.Child(argv, python=python, env=env)


def sizes(job: Any) -> dict[str, Any]:
  """What a rival has to know to be of the same sizes: plain data."""
  model, batch = job.pretrainer.model, job.batch
  found = {
    "batch_size": job.config.batch_size,
    "vocab": model.text.vocab.size,
    "length": batch["text"].shape[1],
    "positions": model.text.length,
    "embed": model.embed_dim,
    "dtype": model.dtype,
    "device": "cuda" if job.mesh.devices.flat[0].platform == "gpu" else "cpu",
    "res": model.image.res,
    "patch": model.image.patch,
    "objectives": sorted(job.pretrainer.objectives),
  }
  for tower in ("image", "text", "fusion"):
    module = getattr(model, tower)
    fields = ("width", "depth", "num_heads", "mlp_dim", "act")
    if module is not None:
      found[tower] = {f: getattr(module, f) for f in fields if hasattr(module, f)}
  return found
