"""Times how soon things start: import, --help, the first step without and with cache.

  python -m vlp_jax.bench compile [--config=configs/albef.py:tiny] [--repeats=N]
    [--out=FILE]

The first step counts from the start of `python -m vlp_jax.train` to its line in
metrics.jsonl: cold with an empty cache of compiled programs, then with what that left.
The best of the repeats is told, and all of them.
"""

import argparse
from collections.abc import Sequence
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from vlp_jax import cli
from vlp_jax.bench import report

ROOT = pathlib.Path(__file__).parents[2]
# Seconds that the issue allows.
TARGETS = {
  "import": 0.3,
  "help": 2.0,
  "first_step_cold": 20.0,
  "first_step_cached": 5.0,
}


def main(argv: Sequence[str] | None = None) -> None:
  """Parses, measures, prints and stores."""
  parser = argparse.ArgumentParser(
    prog="python -m vlp_jax.bench compile",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add("--config", default="configs/albef.py:tiny", metavar="FILE[:arg]")
  add("--repeats", type=int, default=3)
  add("--limit", type=float, default=300.0, help="seconds that one start may take")
  add("--out", type=pathlib.Path, help="file for the JSON")
  args = parser.parse_args(argv)
  with cli.user_errors():
    if args.repeats < 1:
      raise ValueError(f"bench compile: --repeats={args.repeats}: want 1 or more.")
    found = measure(args.config, args.repeats, args.limit)
    report.tell("compile", argv, {"config": args.config, **found}, args.out)


def measure(spec: str, repeats: int, limit: float) -> dict[str, Any]:
  """{what: its best seconds, the target, all seconds}."""
  times: dict[str, list[float]] = {name: [] for name in TARGETS}
  for _ in range(repeats):
    times["import"].append(_imported())
    times["help"].append(_run("-m", "vlp_jax.train", "--help"))
    with tempfile.TemporaryDirectory() as folder:
      cache = pathlib.Path(folder) / "programs"
      for name in ("first_step_cold", "first_step_cached"):
        workdir = pathlib.Path(folder) / name
        times[name].append(first_step(spec, workdir, cache, limit))
  return {
    name: {"seconds": min(values), "target": TARGETS[name], "all": values}
    for name, values in times.items()
  }


def _imported():
  code = "import time; s = time.perf_counter(); import vlp_jax; "
  code += "print(time.perf_counter() - s)"
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    check=True,
    env=_env(),
  )
  return float(done.stdout)


def _run(*argv):
  start = time.perf_counter()
  subprocess.run([sys.executable, *argv], capture_output=True, check=True, env=_env())
  return time.perf_counter() - start


def first_step(
  spec: str, workdir: pathlib.Path, cache: pathlib.Path, limit: float
) -> float:
  """Seconds until a run has logged its first step; the run is then ended.

  Raises:
    ValueError: it ended without, or took longer than `limit`.
  """
  argv = [sys.executable, "-m", "vlp_jax.train", f"--config={spec}"]
  argv += [f"--workdir={workdir}", "--config.log.every=1"]
  env = _env() | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
  log = workdir / "metrics.jsonl"
  start = time.perf_counter()
  with tempfile.TemporaryFile("w+") as said:
    process = subprocess.Popen(argv, env=env, stdout=said, stderr=said)
    try:
      while not (log.is_file() and log.read_text().count("\n")):
        if process.poll() is not None or time.perf_counter() - start > limit:
          said.seek(0)
          last = said.read().strip().splitlines()[-1:]
          raise ValueError(f"bench compile: {spec}: no first step: {last}")
        time.sleep(0.02)
      return time.perf_counter() - start
    finally:
      process.kill()
      process.wait()


def _env():
  """Ours, with this copy of the package first."""
  paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
  return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}


if __name__ == "__main__":
  main()
