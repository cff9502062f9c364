"""Runs of several processes on this machine, each with its own log."""

import os
import pathlib
import socket
import subprocess
import sys

from tests import runs


def free_port() -> int:
  """A port that nobody listens on; outside of those that connections are given."""
  for port in range(61_440 + os.getpid() % 3_000, 65_535):
    with socket.socket() as trial:
      try:
        trial.bind(("", port))
        return port
      except OSError:
        continue
  raise OSError("no free port above 61440")


def start(
  workdir: pathlib.Path,
  *options: str,
  count: int = 2,
  only: tuple[int, ...] | None = None,
  devices: int = 1,
  config: str = str(runs.CONFIG),
  module: str = "vlp_jax.train",
  **env: str,
) -> list[subprocess.Popen]:
  """Starts `count` processes of one run; their output goes to WORKDIR.I.log.

  Args:
    workdir: of the run. options: after --config and --workdir.
    only: start these alone, as if the others never came.
    devices: CPU devices that each process has.
    config, module: what runs. env: of all, beside what names their places.
  """
  env = {
    "VLP_JAX_COORDINATOR": f"localhost:{free_port()}",
    "VLP_JAX_NUM_PROCESSES": str(count),
    "XLA_FLAGS": runs.xla_flags(devices),
    **env,
  }
  if cache := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    # One for all, of which process 0 alone writes; and not that of this process: JAX
    # may read an entry while another still writes it.
    env["JAX_COMPILATION_CACHE_DIR"] = f"{cache}{os.sep}processes"
  argv = [sys.executable, "-m", module, f"--config={config}", f"--workdir={workdir}"]
  started = []
  for index in range(count) if only is None else only:
    place = {"VLP_JAX_PROCESS_ID": str(index)}
    with open(f"{workdir}.{index}.log", "a", encoding="utf-8") as log:
      started.append(
        subprocess.Popen(
          [*argv, *options],
          cwd=runs.ROOT,
          env=os.environ | env | place,
          stdout=log,
          stderr=subprocess.STDOUT,
        )
      )
  return started


def log(workdir: pathlib.Path, index: int) -> str:
  """What a process has printed so far."""
  return pathlib.Path(f"{workdir}.{index}.log").read_text("utf-8")


def finish(
  started: list[subprocess.Popen],
  workdir: pathlib.Path,
  codes: tuple[int, ...] | None = None,
  *,
  timeout: float = 300,
) -> list[str]:
  """What each printed; they must end with these codes, by default 0 each.

  Whoever is left when one does not end in time is killed.
  """
  try:
    got = tuple(process.wait(timeout=timeout) for process in started)
  finally:
    for process in started:
      if process.poll() is None:
        process.kill()
        process.wait()
  logs = [log(workdir, index) for index in range(len(started))]
  assert got == (codes or (0,) * len(started)), f"exit codes {got}:\n" + "\n---\n".join(
    text[-3_000:] for text in logs
  )
  return logs
