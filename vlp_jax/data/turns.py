"""Which kinds of data a step reads: arithmetic on (seed, step), so nothing is kept."""

from collections.abc import Iterator, Mapping
import dataclasses
from typing import Any

import numpy as np

STREAM = 7  # of the draws here, apart from those of other uses of the seed


@dataclasses.dataclass(frozen=True)
class Turns:
  """The kinds of step s are those of the entry s of a cycle that begins anew.

  ("images", "texts", "pairs") is a round robin; ("pairs", "pairs", "texts") gives pairs
  two steps of three; ("images+texts+pairs",) reads all kinds in every step.

  Attributes:
    cycle: its entries, each a kind or several with "+" between.
    drawn: each time round, the entries stand in another order, drawn from (seed, time):
      what comes next is open, and the shares are exact.
    seed: of the run.
  """

  cycle: tuple[str, ...]
  drawn: bool = False
  seed: int = 0

  def __post_init__(self):
    if not self.cycle:
      raise ValueError("config: data.turns is empty: name the kinds in their turn.")
    for entry in self.cycle:
      kinds = entry.split("+")
      if not all(kinds) or len(set(kinds)) < len(kinds):
        raise ValueError(
          f'config: data.turns: {entry!r}: wants a kind, or several as "images+texts".'
        )

  @property
  def kinds(self) -> tuple[str, ...]:
    """All kinds, in the order in which they are first named."""
    named = (kind for entry in self.cycle for kind in entry.split("+"))
    return tuple(dict.fromkeys(named))

  @property
  def shares(self) -> dict[str, float]:
    """{entry: its share of all steps}; entries of the same kinds are one."""
    kinds = [frozenset(entry.split("+")) for entry in self.cycle]
    first = {kind: self.cycle[kinds.index(kind)] for kind in dict.fromkeys(kinds)}
    return {entry: kinds.count(kind) / len(kinds) for kind, entry in first.items()}

  def at(self, step: int) -> tuple[str, ...]:
    """The kinds that a step reads."""
    times, place = divmod(step, len(self.cycle))
    return tuple(self.cycle[self._order(times)[place]].split("+"))

  def seen(self, step: int) -> dict[str, int]:
    """How many of the steps before this one have read each kind."""
    times, place = divmod(step, len(self.cycle))
    whole = [kind for entry in self.cycle for kind in entry.split("+")]
    begun = [self.cycle[at] for at in self._order(times)[:place]]
    part = [kind for entry in begun for kind in entry.split("+")]
    return {k: times * whole.count(k) + part.count(k) for k in self.kinds}

  def _order(self, times):
    count = len(self.cycle)
    if not self.drawn:
      return range(count)
    rng = np.random.default_rng((self.seed, STREAM, times))
    return rng.permutation(count).tolist()


class TurnBatches:
  """{kind: batch} of each step from `start` on, of iterators of the kinds' batches.

  Attributes:
    bad: {reason: number} of broken records so far, of all kinds.
  """

  def __init__(self, turns: Turns, batches: Mapping[str, Any], start: int):
    self._turns, self._batches, self._step = turns, batches, start

  def __iter__(self) -> Iterator[dict[str, dict[str, np.ndarray]]]:
    return self

  def __next__(self) -> dict[str, dict[str, np.ndarray]]:
    kinds = self._turns.at(self._step)
    found = {kind: next(self._batches[kind]) for kind in kinds}
    self._step += 1
    return found

  def sample(self) -> dict[str, dict[str, np.ndarray]]:
    """{kind: a few examples as its batches have them}, of all kinds."""
    return {kind: batches.sample() for kind, batches in self._batches.items()}

  @property
  def bad(self) -> dict[str, int]:
    total: dict[str, int] = {}
    for batches in self._batches.values():
      for reason, count in batches.bad.items():
        total[reason] = total.get(reason, 0) + count
    return total

  def close(self) -> None:
    """Ends what all kinds prepare."""
    for batches in self._batches.values():
      batches.close()
