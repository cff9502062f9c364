"""Where a device's time goes: the kernels of some steps, by name."""

import collections
from collections.abc import Callable, Iterator
import pathlib
import re
import tempfile
from typing import Any

import jax

MOST = 30  # kernels that are told


def kernels(run: Callable[[], object], steps: int) -> dict[str, Any]:
  """Runs `run`, which makes so many steps, under the profiler.

  Returns:
    {"busy_ms": time of a step in which the device computes, "kernels": [{"name", "ms":
    of a step, "count": runs in a step}], longest first}; instructions that differ in
    their number alone are one kernel. Of CPUs it is all devices', and what they do side
    by side counts twice. {} where the devices leave no trace.
  """
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      run()
    (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(file))
    times, counts = collections.Counter(), collections.Counter()
    for name, nanoseconds in _events(data):
      times[name] += nanoseconds
      counts[name] += 1
  if not times:
    return {}
  scale = 1e-6 / steps
  return {
    "busy_ms": scale * sum(times.values()),
    "kernels": [
      {"name": name, "ms": scale * spent, "count": counts[name] / steps}
      for name, spent in times.most_common(MOST)
    ],
  }


def _events(data) -> Iterator[tuple[str, float]]:
  """(kernel, nanoseconds) of all that ran on the first device, or on the CPUs."""
  planes = [p for p in data.planes if p.name.startswith("/device:")]
  planes = [p for p in planes if re.search(r"(GPU|TPU):\d+", p.name)]
  # A GPU's streams; of a TPU, the instructions.
  lines = ("Stream", "XLA Ops")
  if not planes:
    # XLA's threads, not Python's.
    planes, lines = [p for p in data.planes if p.name == "/host:CPU"], ("tf_XLA",)
  for line in planes[0].lines if planes else ():
    if not line.name.startswith(lines):
      continue
    for event in line.events:
      found = dict(event.stats)
      if planes[0].name == "/host:CPU" and "hlo_op" not in found:
        continue  # The runtime's own.
      name = str(found.get("hlo_op", event.name))
      kernel = "" if name == event.name else f" {event.name[:60]}"
      yield re.sub(r"[.\d]+$", "", name) + kernel, event.duration_ns
