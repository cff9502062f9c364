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


@dataclasses.dataclass(frozen=True)
class Choice:
  """One way to lay out a run.

  Attributes:
    mesh: sizes of the axes. remat: of all towers.
  """

  mesh: tuple[tuple[str, int], ...]
  remat: str

  @property
  def overrides(self) -> tuple[str, ...]:
    """As the command line says it."""
    axes = [f"--config.sharding.mesh.{axis}={size}" for axis, size in self.mesh]
    return (*axes, f"--config.model.remat={self.remat}")

  def of(self, config: config_lib.Run) -> config_lib.Run:
    return run_lib.with_fields(
      config,
      remat=self.remat,
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

  For each mesh the policies are tried from the fastest on, and the first that fits is
  the mesh's best: a policy that keeps less computes more. Where the state alone does
  not fit, nothing is compiled. The search ends at the first mesh that fits without any
  remat: those behind it send more and compute no less.

  Args:
    state_of: bytes of a device that the state takes, by shapes alone.
    plan_of: compiles a choice. usable: bytes. tell: is told of each.
  """
  best = None
  for mesh in meshes(config, devices):
    axes = tuple(mesh.items())
    said = (
      ", ".join(f"{axis} {size}" for axis, size in axes if size > 1) or "one device"
    )
    state = state_of(Choice(axes, "full").of(config))
    if state > usable:
      tell(f"{said}: the state alone takes {state / result.GIB:.1f} GiB")
      continue
    for remat in REMAT:
      choice = Choice(axes, remat)
      plan = plan_of(choice)
      verdict = "does not fit"
      if plan.fits:
        verdict = f"{plan.seconds['step'] * 1e3:.1f} ms"
      tell(f"{said}, remat {remat}: {plan.needed / result.GIB:.1f} GiB, {verdict}")
      if not plan.fits:
        continue
      if best is None or plan.seconds["step"] < best[1].seconds["step"]:
        best = choice, plan
      if remat == REMAT[0]:
        return best
      break
  return best
