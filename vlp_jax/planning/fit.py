"""Finds the fastest way to lay out a run that fits: mesh, remat, microbatches."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import math
from typing import Any

from vlp_jax import config as config_lib
from vlp_jax.planning import result
from vlp_jax.planning import run as run_lib

# From what is fastest to what takes least memory; see `nn/block.py`.
REMAT = ("none", "dots", "dots_no_batch", "full")
# Of what one choice was seen to take, another is sure to take this much of what is
# derived from it: compilers differ by some percent from mesh to mesh.
SURE = 0.9
# A chip pads arrays to its tiles, to at most twice as much (heads of 64 on a TPU).
PADDED = 2.0


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

  def __str__(self) -> str:
    pieces = f", accumulate {self.accumulate}" * (self.accumulate > 1)
    return f"{_axes(self.mesh)}, remat {self.remat}{pieces}"


def _axes(mesh):
  said = ", ".join(f"{axis} {size}" for axis, size in mesh if size > 1)
  return said or "one device"


@dataclasses.dataclass(frozen=True)
class Found:
  """What a search ended with.

  Attributes:
    best: the fastest choice that fits, and its plan; None: there is none.
    compiled: all that were. ended: why there are no more; None: there is no need.
  """

  best: tuple[Choice, result.Plan] | None
  compiled: dict[Choice, result.Plan]
  ended: str | None = None


def meshes(config: config_lib.Run, devices: int) -> Iterator[dict[str, int]]:
  """Splits of the devices that the batch and the heads allow.

  With a tensor axis of 1, 2, 4 or 8: the state split within a host of eight, which
  takes less than whole on each device and sends little; whole; split over all.
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
    if config.batch_size // config.accumulate % left:
      continue
    for fsdp in dict.fromkeys((math.gcd(left, 8), 1, left)):
      yield dict(data=left // fsdp, fsdp=fsdp, tensor=tensor)


def search(
  config: config_lib.Run,
  devices: int,
  *,
  state_of: Callable[[config_lib.Run], float],
  kept_of: Callable[[config_lib.Run], float],
  plan_of: Callable[[Choice], result.Plan],
  usable: float,
  tell: Callable[[str], Any],
  late: Callable[[], bool] = lambda: False,
) -> Found:
  """Looks for the fastest choice that fits.

  Compiling is what takes time. What is known not to fit is left out (`_Search.least`);
  so is a policy that keeps less where one that keeps more fits, since it computes more,
  and a wider tensor axis where a narrower one fits, since it sends and keeps more.
  Where nothing fits, the batch is accumulated in microbatches, as few as will do.

  Args:
    state_of: bytes of a device that the state takes, by shapes alone; raises ValueError
      where there is no such step.
    kept_of: see `kept.of_step`. plan_of: compiles a choice.
    usable: bytes. tell: is told of each choice.
    late: whether what has been found has to do.

  Raises:
    ValueError: the batch splits over no mesh.
  """
  if not any(meshes(config, devices)):
    raise ValueError(
      f"config: batch_size={config.batch_size}, accumulate={config.accumulate}: no mesh"
      f" of {devices} devices splits it: choose a multiple of {devices} x accumulate."
    )
  run = _Search(config, devices, state_of, kept_of, plan_of, usable, tell, late)
  try:
    run.whole()
    if run.best is None:
      run.accumulated()
  except (_LateError, KeyboardInterrupt) as error:
    ended = "the time is up" if isinstance(error, _LateError) else "interrupted"
    return Found(run.best, run.compiled, ended)
  return Found(run.best, run.compiled)


class _LateError(Exception):
  """There is no time to compile another."""


class _Search:
  """A search under way.

  Attributes:
    best: (choice, plan) of the fastest that fits so far, or None.
    compiled: {choice: plan}.
  """

  def __init__(self, config, devices, state_of, kept_of, plan_of, usable, tell, late):
    self._config, self._devices, self._usable = config, devices, usable
    self._plan_of, self._tell, self._late = plan_of, tell, late
    self._meshes = [tuple(mesh.items()) for mesh in meshes(config, devices)]
    self.best, self.compiled = None, {}

    # The state is the same for every policy, what is kept for every mesh.
    def state(mesh, accumulate=config.accumulate):
      return state_of(Choice(mesh, REMAT[-1], accumulate).of(config))

    def kept(remat):
      choice = Choice(self._meshes[0], remat, config.accumulate)
      return kept_of(choice.of(config)) / devices

    self._state, self._kept = functools.cache(state), functools.cache(kept)

  def whole(self):
    """Tries each mesh with the policy that keeps most of those that fit."""
    for mesh in self._narrow():
      for remat in REMAT:
        choice = Choice(mesh, remat, self._config.accumulate)
        least = self.least(choice)
        if least > self._usable:
          self._tell(f"{choice}: at least {least / result.GIB:.1f} GiB, not compiled")
        elif self._fits(choice):
          break
        if self.best is not None and remat == self.best[0].remat:
          break

  def accumulated(self):
    """Tries each policy with as few microbatches as will do.

    Which is fastest nobody knows before: microbatches of a policy that keeps less are
    larger. The policy that is, is tried on the other meshes.
    """
    for mesh in self._narrow():
      counts = self._counts(mesh)
      if counts and not self._splits(mesh, counts[0]):
        return  # No number will do.
      for remat in REMAT if self.best is None else [self.best[0].remat]:
        for count in counts:
          choice = Choice(mesh, remat, count)
          if self.least(choice) > self._usable:
            continue
          if not self._splits(mesh, count):
            counts = [each for each in counts if each < count]
            break
          if self._fits(choice):
            break

  def _narrow(self):
    """The meshes, up to the tensor axis of what has been found."""
    for mesh in self._meshes:
      if self.best is not None and mesh[-1] > self.best[0].mesh[-1]:
        return
      state = self._state(mesh)
      if state > self._usable:
        self._tell(f"{_axes(mesh)}: the state alone takes {state / result.GIB:.1f} GiB")
        continue
      yield mesh

  def _counts(self, mesh):
    """Numbers of microbatches that split the rows of a device, beyond the config's."""
    sizes = dict(mesh)
    rows = self._config.batch_size // (sizes["data"] * sizes["fsdp"])
    return [n for n in range(self._config.accumulate + 1, rows + 1) if not rows % n]

  def _splits(self, mesh, count):
    """Whether there is a step of so many microbatches."""
    try:
      self._state(mesh, count)
    except ValueError as error:
      self._tell(f"{_axes(mesh)}: {error}")
      return False
    return True

  def _fits(self, choice):
    """Compiles a choice, and keeps it where it is the fastest."""
    if self.best is not None and self._late():
      raise _LateError
    self._tell(f"{choice}: compiling …")
    plan = self.compiled[choice] = self._plan_of(choice)
    time = f"{plan.seconds['step'] * 1e3:.1f} ms" if plan.fits else "does not fit"
    self._tell(f"{choice}: {plan.needed / result.GIB:.1f} GiB, {time}")
    step = plan.seconds["step"] if plan.fits else math.inf
    if step < (math.inf if self.best is None else self.best[1].seconds["step"]):
      self.best = choice, plan
    return plan.fits

  def least(self, choice: Choice) -> float:
    """Bytes of a device that a choice takes at least, as far as is known.

    The state, and what is kept for the backward pass. What was compiled says how much
    comes on top: another mesh takes less by no more than what it splits of the state,
    another policy by what it keeps less, padded; more microbatches by their share.
    """
    state = self._state(choice.mesh)
    kept = self._kept(choice.remat) * self._config.accumulate / choice.accumulate
    rest = kept
    for other, plan in self.compiled.items():
      if other.accumulate > choice.accumulate:
        continue
      there = self._kept(other.remat) * self._config.accumulate / choice.accumulate
      held = self._state(other.mesh)
      took = plan.needed - held - max(0.0, held - state)
      took *= other.accumulate / choice.accumulate
      took += (kept - there) * (1.0 if kept > there else PADDED)
      rest = max(rest, SURE * took)
    return state + rest
