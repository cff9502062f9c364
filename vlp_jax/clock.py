"""What durations of a config are in steps of a run."""

import dataclasses
import fractions
import math

from vlp_jax import config as config_lib
from vlp_jax import schema


@dataclasses.dataclass(frozen=True)
class Clock:
  """Turns durations into steps of this run.

  Attributes:
    batch_size: examples a step. epoch_size: examples an epoch.
    total: steps of the run, which a percentage is of; 0 where that is not known.
  """

  batch_size: int
  epoch_size: int
  total: int = 0

  def steps(self, duration: schema.Duration) -> int:
    """The number of steps, to the nearest, and at least 1 of what is not 0.

    Args:
      duration: 300, "300 steps", "2 epochs", "1_000_000 examples" or "5%".

    Raises:
      ValueError: it is no duration, or a percentage of what is not known.
    """
    count, unit = schema.duration(duration)
    if unit == "%" and not self.total:
      raise ValueError(f"config: total={duration!r}: wants steps, epochs or examples.")
    per_unit = {
      "step": fractions.Fraction(1),
      "epoch": fractions.Fraction(self.epoch_size, self.batch_size),
      "example": fractions.Fraction(1, self.batch_size),
      "%": fractions.Fraction(self.total, 100),
    }
    exact = count * per_unit[unit]
    return max(1, math.floor(exact + fractions.Fraction(1, 2))) if exact else 0


def of(config: config_lib.Run, epoch_size: int) -> Clock:
  """The clock of a run over a source of `epoch_size` examples."""
  start = Clock(config.batch_size, epoch_size)
  return dataclasses.replace(start, total=start.steps(config.total))
