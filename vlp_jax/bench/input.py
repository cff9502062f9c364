"""Times the way from JPEGs to batches, beside PyTorch, webdataset and bare decoding.

  python -m vlp_jax.bench input [--images=FOLDER|ZIP] [--against=NAME,NAME]
    [--python=FILE] [--res=224] [--batch_size=64] [--repeats=N] [--count=N] [--out=FILE]

Without --images it draws scenes. All readers take turns on the same files: with one
worker in one core, where images for a second of processor time count, and with a worker
for each core, by the clock. --against: torch_loader and webdataset, whose packages
--python has; "" for none. Last, the share of time that a step waits which takes half as
long again as the input.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import io
import json
import os
import pathlib
import shutil
import tarfile
import tempfile
import time
from typing import Any
import zipfile

from vlp_jax import cli
from vlp_jax import memory
from vlp_jax.bench import report
from vlp_jax.bench import timing
from vlp_jax.bench.readers import work as work_lib

ROOT = pathlib.Path(__file__).parents[2]
# Which of our ways; the reader of each is readers/ours.py.
OURS = {"ours": "turbo", "ours_exact": "pillow"}
RIVALS = ("torch_loader", "webdataset")
SLOWER = 1.5  # of the step that must not wait, over the input


def main(argv: Sequence[str] | None = None) -> None:
  """Parses, measures, prints and stores."""
  parser = argparse.ArgumentParser(
    prog="python -m vlp_jax.bench input",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add("--images", type=pathlib.Path, help="folder or .zip of JPEGs; default: scenes")
  add("--count", type=int, default=1000, help="of the files, at most")
  add("--against", default=",".join(RIVALS), help="other readers, or nothing")
  add("--python", help="interpreter that has their packages")
  add("--res", type=int, default=224)
  add("--batch_size", type=int, default=64)
  add("--round", type=int, default=512, help="images of a round")
  add("--repeats", type=int, default=6, help="rounds of each")
  add("--out", type=pathlib.Path, help="file for the JSON")
  args = parser.parse_args(argv)
  with cli.user_errors(), tempfile.TemporaryDirectory() as folder:
    wanted = [name for name in args.against.split(",") if name]
    unknown = set(wanted) - set(RIVALS)
    if unknown:
      raise ValueError(
        f"bench input: --against={args.against}: no such reader as"
        f" {', '.join(sorted(unknown))}; there are {', '.join(RIVALS)}."
      )
    data = prepare(pathlib.Path(folder), args.images, args.count)
    work = work_lib.Work(folder, args.round, args.batch_size, args.res, workers=1)
    results = measure(work, wanted, repeats=args.repeats, python=args.python)
    report.tell("input", argv, {"data": data, **results}, args.out)


def prepare(
  folder: pathlib.Path, images: pathlib.Path | None, count: int
) -> dict[str, Any]:
  """Fills the folder with JPEGs, a table and a .tar of them; says what they are.

  Raises:
    ValueError, FileNotFoundError: there are no JPEGs in `images`.
  """
  if images is None:
    _draw(folder, min(count, 200))
  elif images.is_dir():
    for i, file in enumerate(sorted(images.rglob("*.jp*g"))[:count]):
      shutil.copyfile(file, folder / f"{i:06}.jpg")
  elif images.is_file():
    with zipfile.ZipFile(images) as archive:
      names = [n for n in sorted(archive.namelist()) if n.endswith((".jpg", ".jpeg"))]
      for i, name in enumerate(names[:count]):
        (folder / f"{i:06}.jpg").write_bytes(archive.read(name))
  else:
    raise FileNotFoundError(f"bench input: --images={images}: no such folder or .zip.")
  files = sorted(folder.glob("*.jpg"))
  if not files:
    raise ValueError(f"bench input: --images={images}: has no .jpg files.")
  with (folder / "table.jsonl").open("w") as table:
    for file in files:
      table.write(json.dumps({"image": file.name, "caption": "a picture"}) + "\n")
  with tarfile.open(folder / "images.tar", "w") as tar:
    for file in files:
      tar.add(file, file.name)
  size = sum(file.stat().st_size for file in files)
  return {
    "images": "drawn scenes" if images is None else images.name,
    "files": len(files),
    "mean_bytes": size // len(files),
  }


def _draw(folder, count):
  # Here: drawing is wanted only where there are no pictures.
  import numpy as np
  from PIL import Image

  from vlp_jax.data.sources import scenes

  source = scenes.Source(size=count, res=256)
  for i, example in enumerate(source.read(np.arange(count))):
    image = Image.open(io.BytesIO(example["image"])).convert("RGB")
    image.save(folder / f"{i:06}.jpg", quality=85)


def measure(
  work: work_lib.Work, rivals: Sequence[str], *, repeats: int, python: str | None
) -> dict[str, Any]:
  """Rates of all readers, on one core and on all; and the share of waiting."""
  cores = report.cores()
  results: dict[str, Any] = {
    "res": work.res,
    "batch_size": work.batch_size,
    "images_per_round": work.images,
    "repeats": repeats,
    "one_core": _rates(work, rivals, repeats, python),
  }
  if cores > 1:
    many = dataclasses.replace(work, workers=cores)
    results[f"{cores}_cores"] = _rates(many, rivals, repeats, python)
    work = many
  results["waiting"] = waiting(dataclasses.replace(work, by="turbo"))
  return results


def _rates(work, rivals, repeats, python):
  """{reader: images a second}, and how ours stand to the others."""
  readers = {
    name: _child("ours", dataclasses.replace(work, by=by), None)
    for name, by in OURS.items()
  }
  readers["bare"] = _child("bare", work, None)
  plain = memory.as_it_comes()
  readers |= {name: _child(name, work, python, plain) for name in rivals}
  try:
    times = timing.side_by_side(readers, repeats=repeats)
  finally:
    for child in readers.values():
      child.close()
  rates = {}
  for name, child in readers.items():
    rates[name] = {
      "images_per_second": work.images / times[name].best,
      "median": work.images / times[name].median,
      **child.about,
    }
    if work.workers == 1:
      # All of the work is in one process: what else ran on the core does not count.
      rates[name]["images_per_cpu_second"] = work.images / times[name].least_cpu
  key = "images_per_cpu_second" if work.workers == 1 else "images_per_second"
  ours = {name: rates[name][key] for name in OURS}
  return rates | {
    "ratios": {
      f"{name}/{other}": ours[name] / rates[other][key]
      for name in OURS
      for other in ("bare", *rivals)
    }
  }


def _child(name, work, python, env=None):
  """A reader's process."""
  paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  argv = ["-m", f"vlp_jax.bench.readers.{name}", json.dumps(dataclasses.asdict(work))]
  env = {"PYTHONPATH": paths.strip(os.pathsep)} | (env or {})
  return timing.Child(argv, python=python, env=env)


def waiting(work: work_lib.Work, *, steps: int = 48) -> dict[str, float]:
  """How long a device waits whose step takes `SLOWER` times as long as the input.

  The step sleeps, as a host does while an accelerator computes; transfers and waiting
  are those of the trainer's loop.
  """
  # Here, not above: the readers' process needs no jax, and --help nothing at all.
  import contextlib

  from vlp_jax.bench.readers import ours
  from vlp_jax.training import sharding
  from vlp_jax.training import timing as loop_timing

  mesh = sharding.make_mesh(sharding.Sharding())
  with contextlib.closing(ours.batches(work)) as batches:
    for _ in range(4):
      next(batches)
    start = time.perf_counter()
    for _ in range(steps):  # many more than can lie ready
      next(batches)
    input_seconds = (time.perf_counter() - start) / steps
    ahead = loop_timing.Waiting(sharding.prefetch(batches, mesh))
    next(ahead)
    ahead.seconds, start = 0.0, time.perf_counter()
    for _ in range(steps):
      time.sleep(SLOWER * input_seconds)
      next(ahead)
    whole = time.perf_counter() - start
  return {
    "input_ms": 1e3 * input_seconds,
    "step_ms": 1e3 * SLOWER * input_seconds,
    "share": ahead.seconds / whole,
  }


if __name__ == "__main__":
  main()
