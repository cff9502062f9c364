"""Finds the fastest way to lay out a run that fits: mesh, remat, microbatches."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import math
from typing import Any

from vlp_jax import config as config_lib
from vlp_jax.planning import result
from vlp_jax.planning import run as run_lib

# From what is fastest to what takes least memory; see `nn/block.py`.
REMAT = ("none", "dots", "dots_no_batch", "full")
# Microbatches of exact accumulation, which runs the encoders' forward once more.
ACCUMULATE = (2, 4, 8, 16, 32, 64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Choice:
  """One way to lay out a run.

  Attributes:
    mesh: sizes of the axes. remat: of all towers. accumulate: microbatches.
  """

  mesh: tuple[tuple[str, int], ...]
  remat: str
  accumulate: int

  @property
  def overrides(self) -> tuple[str, ...]:
    """As the command line says it."""
    axes = [f"--config.sharding.mesh.{axis}={size}" for axis, size in self.mesh]
    pieces = [f"--config.accumulate={self.accumulate}"] * (self.accumulate > 1)
    return (*axes, f"--config.model.remat={self.remat}", *pieces)

  def of(self, config: config_lib.Run) -> config_lib.Run:
    return run_lib.with_fields(
      config,
      remat=self.remat,
      accumulate=self.accumulate,
      sharding=config.sharding | dict(mesh=dict(self.mesh)),
    )


def meshes(config: config_lib.Run, devices: int) -> Iterator[dict[str, int]]:
  """Splits of the devices that the batch and the heads allow, least traffic first.

  All data; fsdp within a host of eight, and over all; a tensor axis of 2, 4 or 8.
  """
  heads = [
    tower["num_heads"]
    for tower in config.model.values()
    if isinstance(tower, Mapping) and "num_heads" in tower
  ]
  for tensor in (1, 2, 4, 8):
    if devices % tensor or any(number % tensor for number in heads):
      continue
    left = devices // tensor
    if config.batch_size % left:
      continue
    for fsdp in dict.fromkeys((1, math.gcd(left, 8), left)):
      yield dict(data=left // fsdp, fsdp=fsdp, tensor=tensor)


def search(
  config: config_lib.Run,
  devices: int,
  *,
  state_of: Callable[[config_lib.Run], float],
  plan_of: Callable[[Choice], result.Plan],
  usable: float,
  tell: Callable[[str], Any],
) -> tuple[Choice, result.Plan] | None:
  """The fastest choice that fits, or None where none does.

  For each mesh the fastest policy that fits is the best: a policy that keeps less
  computes more. The fastest of all is tried first, the others by bisection. Where even
  full remat does not fit, the batch is accumulated in microbatches, as few as will do.
  Where the state alone does not fit, nothing is compiled. The search ends at the first
  mesh that fits without remat: those behind it send more and compute no less.

  Args:
    state_of: bytes of a device that the state takes, by shapes alone.
    plan_of: compiles a choice; raises ValueError where there is no such step.
    usable: bytes. tell: is told of each.
  """
  best = None
  for mesh in meshes(config, devices):
    axes = tuple(mesh.items())
    said = (
      ", ".join(f"{axis} {size}" for axis, size in axes if size > 1) or "one device"
    )
    state = state_of(Choice(axes, REMAT[-1], config.accumulate).of(config))
    if state > usable:
      tell(f"{said}: the state alone takes {state / result.GIB:.1f} GiB")
      continue
    found = _of_mesh(axes, config.accumulate, plan_of, usable, tell)
    if found is None:
      continue
    if best is None or found[1].seconds["step"] < best[1].seconds["step"]:
      best = found
    if (found[0].remat, found[0].accumulate) == (REMAT[0], config.accumulate):
      break
  return best


def _of_mesh(axes, accumulate, plan_of, usable, tell):
  """The first choice of a mesh that fits, and its plan; None: there is none."""

  def compiled(remat, accumulate):
    choice = Choice(axes, remat, accumulate)
    plan = plan_of(choice)
    tell(_line(choice, plan))
    return choice, plan

  choice, plan = compiled(REMAT[0], accumulate)
  if plan.fits:
    return choice, plan
  # Among the others by bisection: what keeps less takes less.
  found, low, high = None, 1, len(REMAT) - 1
  while low <= high:
    middle = (low + high) // 2
    choice, plan = compiled(REMAT[middle], accumulate)
    if plan.fits:
      found, high = (choice, plan), middle - 1
    else:
      low = middle + 1
  if found is not None:
    return found
  rest = plan.memory["activations and temporaries"]
  room = usable - (plan.needed - rest)
  for count in ACCUMULATE:
    # Activations shrink at best in proportion; what cannot fit is not compiled.
    if count <= accumulate or rest * accumulate / count > room:
      continue
    try:
      choice, plan = compiled(REMAT[-1], count)
    except ValueError as error:
      tell(f"accumulate {count}: {error}")
      return None
    if plan.fits:
      return choice, plan
  return None


def _line(choice, plan):
  said = ", ".join(f"{axis} {size}" for axis, size in choice.mesh if size > 1)
  time = f"{plan.seconds['step'] * 1e3:.1f} ms" if plan.fits else "does not fit"
  pieces = f", accumulate {choice.accumulate}" * (choice.accumulate > 1)
  return (
    f"{said or 'one device'}, remat {choice.remat}{pieces}:"
    f" {plan.needed / result.GIB:.1f} GiB, {time}"
  )
