"""What every benchmark prints and stores: one JSON object, and who made it where."""

from collections.abc import Mapping, Sequence
import datetime
import json
import os
import pathlib
import platform
import sys
from typing import Any

FOLDER = pathlib.Path("runs/bench")


def machine() -> dict[str, Any]:
  """Processor, the cores that this process may use, Python, and the time."""
  model = platform.processor() or platform.machine()
  info = pathlib.Path("/proc/cpuinfo")
  if info.is_file():
    names = [line for line in info.read_text().splitlines() if "model name" in line]
    model = names[0].partition(":")[2].strip() if names else model
  return {
    "cpu": model,
    "cores": cores(),
    "load": list(os.getloadavg()),
    "python": platform.python_version(),
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
  }


def cores() -> int:
  """Those that this process may use."""
  try:
    return len(os.sched_getaffinity(0))
  except AttributeError:  # not on Linux
    return os.cpu_count() or 1


def tell(
  kind: str,
  argv: Sequence[str] | None,
  results: Mapping[str, Any],
  out: pathlib.Path | None,
) -> None:
  """Prints the results, and stores them with the command and the machine.

  Args:
    kind: of benchmark. argv: its command line, as `main` got it.
    out: file; None: runs/bench/KIND-DATE.json.
  """
  said = sys.argv[1:] if argv is None else list(argv)
  whole = {
    "benchmark": kind,
    "command": " ".join(["python -m vlp_jax.bench", kind, *said]),
    **results,
    "machine": machine(),
  }
  text = json.dumps(whole, indent=2)
  stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
  out = out or FOLDER / f"{kind}-{stamp}.json"
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(text + "\n", "utf-8")
  print(text, flush=True)
  print(f"stored in {out}", file=sys.stderr, flush=True)
