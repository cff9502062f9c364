"""Runs a planned step on the devices that are here, and holds the plan against it."""

from collections.abc import Callable
import dataclasses
import os
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from vlp_jax import batch as batch_lib
from vlp_jax import config as config_lib
from vlp_jax import job as job_lib
from vlp_jax.planning import hardware
from vlp_jax.planning import result
from vlp_jax.training import sharding as sharding_lib


@dataclasses.dataclass(frozen=True)
class Measured:
  """What was seen on the devices.

  Attributes:
    step: seconds, the median of `steps` of them; where steps read different kinds of
      data, the mean of these.
    peak: bytes that were in use at most; None where the device does not say (a CPU).
    loss: of the last step.
  """

  step: float
  steps: int
  peak: float | None
  loss: float


def here() -> tuple[str, list[jax.Device]]:
  """("h100:8", devices): the topology that this machine is, as the planner names it.

  Raises:
    ValueError: the hardware has no line in `hardware.CHIPS`.
  """
  devices = jax.devices()
  kind, count = devices[0].device_kind, len(devices)
  if devices[0].platform == "cpu":
    return f"cpu:{count}", devices
  name = hardware.called(kind)
  if name is None:
    raise ValueError(
      f"plan: --measure: {kind!r} has no line in vlp_jax/planning/hardware.py: add its"
      " peaks there."
    )
  if hardware.CHIPS[name].gpu is not None:
    return f"{name}:{count}", devices
  spans = [max(axis) + 1 for axis in zip(*(d.coords for d in devices), strict=True)]
  axes = 2 if name in ("v5e", "v6e") else 3
  return f"{name}:{'x'.join(map(str, sorted(spans[:axes])))}", devices


def check(config: config_lib.Run, steps: int) -> None:
  """That `run` can be had, before anything is compiled.

  Raises:
    ValueError: fewer than one step, or one that the host streams.
  """
  if steps < 1:
    raise ValueError(f"plan: --steps={steps}: want 1 or more.")
  if config.accumulate_stream:
    raise ValueError(
      "config: accumulate_stream=True: plan --measure runs a step of one program: say"
      " --config.accumulate_stream=False."
    )


def run(job: job_lib.Job, *, steps: int) -> Measured:
  """A few steps of the run on its mesh, after one that compiles; see `check`."""
  step = job_lib.stepping(job)
  state = job_lib.fresh_state(job)
  mean = 0.0
  with sharding_lib.use(job.mesh, job.sharding):
    for reading in job.readings:
      noise = batch_lib.noise(reading.batch, job.pretrainer.model.text.vocab)
      batch = sharding_lib.put_batch(noise, job.mesh)
      seconds = []
      for _ in range(steps + 1):
        begun = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - begun)
      mean += reading.share * statistics.median(seconds[1:])
  peaks = [
    (d.memory_stats() or {}).get("peak_bytes_in_use") for d in job.mesh.local_devices
  ]
  known = [peak for peak in peaks if peak is not None]
  return Measured(
    step=mean,
    steps=steps,
    peak=float(max(known)) if known else None,
    loss=float(metrics["loss"].value()),
  )


def cpu(devices: int) -> hardware.Chip:
  """A chip of this machine's CPU, measured: a share of it for each of its devices.

  Rates are of one product of 1,024 x 1,024 matrices in float32, and of a copy of 64
  MiB, the best of five.
  """
  x = jnp.ones((1024, 1024), jnp.float32)
  product = jax.jit(jnp.dot)
  rate = 2 * 1024**3 / _best(lambda: product(x, x))
  big = jnp.ones(2**24, jnp.float32)
  copy = jax.jit(lambda a: a + 1)
  bandwidth = 2 * big.nbytes / _best(lambda: copy(big))
  rates = dict.fromkeys(("half", "single", "single_high", "double"), rate / devices)
  memory = _memory() / devices
  # Messages are copies.
  link = bandwidth / devices
  return hardware.Chip("cpu", rates, memory, memory, bandwidth / devices, link)


def _best(call: Callable[[], Any]) -> float:
  jax.block_until_ready(call())
  seconds = []
  for _ in range(5):
    begun = time.perf_counter()
    jax.block_until_ready(call())
    seconds.append(time.perf_counter() - begun)
  return min(seconds)


def _memory():
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def as_json(plan: result.Plan, seen: Measured) -> dict[str, Any]:
  """What was seen, and how many times what was predicted."""
  return dataclasses.asdict(seen) | {
    "step_ratio": seen.step / plan.seconds["step"],
    "memory_ratio": None if seen.peak is None else seen.peak / _held(plan),
  }


def _held(plan):
  """What was predicted of this loop, which has one batch."""
  return plan.needed - plan.memory["next batches"]


def render(plan: result.Plan, seen: Measured) -> str:
  """Predicted beside measured."""
  step = plan.seconds["step"]
  lines = [
    "",
    f"Measured: {seen.steps} steps on random inputs, loss {seen.loss:.3f}",
    f"  {'step, ms':<28}{seen.step * 1e3:>9.2f}  predicted {step * 1e3:.2f}:"
    f" {seen.step / step:.2f} times as long",
  ]
  if seen.step < step:
    lines.append(
      f"  {'':<37}  less than main memory allows: much of it stays in a cache"
    )
  if seen.peak is None:
    lines.append(
      f"  {'memory, GiB':<28}{'–':>9}  predicted {_held(plan) / result.GIB:.2f};"
      " this device (a CPU) does not say what is in use"
    )
  else:
    lines.append(
      f"  {'memory, GiB':<28}{seen.peak / result.GIB:>9.2f}  predicted"
      f" {_held(plan) / result.GIB:.2f}: {seen.peak / _held(plan):.2f} times as much"
    )
  return "\n".join(lines)
