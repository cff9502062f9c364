"""The time of a step: what arithmetic, memory and messages take at best."""

import dataclasses

from vlp_jax.planning import cost as cost_lib
from vlp_jax.planning import hardware


@dataclasses.dataclass(frozen=True)
class Times:
  """Seconds of one program, or of a step, on one device.

  Attributes:
    compute: of all products at peak. memory: of all bytes at the main memory's rate.
    messages: of all collectives at the links' rate.
    serial: instruction by instruction, the longer of compute and memory: one waits for
      the other.
  """

  compute: float
  memory: float
  messages: float
  serial: float

  @property
  def step(self) -> float:
    """What is predicted: messages run beside the rest."""
    return max(self.serial, self.messages)

  @property
  def limit(self) -> str:
    """The term that is largest: "compute", "memory" or "interconnect"."""
    terms = dict(compute=self.compute, memory=self.memory, interconnect=self.messages)
    return max(terms, key=terms.get)

  def __add__(self, other: "Times") -> "Times":
    mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
    return Times(*(a + b for a, b in zip(mine, theirs, strict=True)))

  def __mul__(self, times: float) -> "Times":
    return Times(*(times * value for value in dataclasses.astuple(self)))


def times(cost: cost_lib.Cost, chip: hardware.Chip, *, nodes: int = 1) -> Times:
  """How long a run of the program takes on a chip.

  Args:
    nodes: that the devices are spread over, where these have a network between them.
  """

  def compute_of(flops):
    return sum(number / chip.flops[kind] for kind, number in flops.items())

  rate = chip.link
  if nodes > 1 and chip.network is not None:
    # A ring over all nodes enters and leaves each once: its step is the slower of a
    # link and a node's network.
    rate = min(rate, chip.network)
  serial = sum(
    w.count * max(compute_of(w.flops), w.bytes / chip.bandwidth) for w in cost.work
  )
  return Times(
    compute=compute_of(cost.flops),
    memory=cost.bytes / chip.bandwidth,
    messages=sum(m.count * m.sent for m in cost.messages) / rate,
    serial=serial,
  )
