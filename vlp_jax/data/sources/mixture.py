"""Several sources as one, each with its share: arithmetic on the index, no state."""

import collections
from collections.abc import Mapping
import dataclasses
import functools
import importlib
import math
import pathlib
from typing import Any

import numpy as np

HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Source:
  """The examples of all parts; an epoch shows every example at least once.

  Without weights it is one part after the other. With weights, the parts that would run
  out are shown anew, as often as the largest needs: two sources of 100 and 1,000
  examples, weighted alike, make an epoch of 2,000.

  Attributes:
    parts: {name: dict(type=…, …)}, each a source.
    weights: {name: positive number}, in any unit, for all parts; None: by their sizes.
  """

  parts: dict
  weights: dict | None = None

  def __post_init__(self):
    if not self.parts:
      raise ValueError("config: source.parts is empty: name at least one source.")
    if self.weights is not None:
      if set(self.weights) != set(self.parts):
        raise ValueError(
          f"config: source.weights is of {', '.join(sorted(self.weights))}, and"
          f" source.parts has {', '.join(sorted(self.parts))}: give each part a weight."
        )
      for name, weight in self.weights.items():
        if not (isinstance(weight, int | float) and 0 < weight < math.inf):
          raise ValueError(
            f"config: source.weights.{name}={weight!r}: want a number above 0; to leave"
            " a part out, take it out of source.parts."
          )
    _ = self._ends  # a part that cannot be read is told now

  def __len__(self) -> int:
    return int(self._ends[-1])

  def read(self, indices: np.ndarray) -> list[dict]:
    """Raw examples, see sources/__init__.py; `image_id`s of two parts never agree."""
    out: list[Any] = [None] * len(indices)
    for part, places, within in self._split(indices):
      read = self._sources[part].read(within)
      for place, example in zip(places, read, strict=True):
        image_id = example["image_id"] * len(self._sources) + part
        out[place] = example | {"image_id": image_id}
    return out

  def captions(self, indices: np.ndarray) -> list[str]:
    """All captions of these examples, part by part."""
    texts = []
    for part, _, within in self._split(indices):
      texts += self._sources[part].captions(within)
    return texts

  def _split(self, indices):
    """Yields (part, places among the indices, indices within the part)."""
    places = collections.defaultdict(list)
    parts = np.searchsorted(self._ends, indices, side="right")
    for place, part in enumerate(parts):
      places[int(part)].append(place)
    starts = np.concatenate([[0], self._ends[:-1]])
    for part, at in sorted(places.items()):
      within = np.asarray(indices)[at] - starts[part]
      yield part, at, within % len(self._sources[part])

  @functools.cached_property
  def _sources(self) -> list[Any]:
    return [_source(name, spec) for name, spec in self.parts.items()]

  @functools.cached_property
  def _ends(self) -> np.ndarray:
    """int64: where each part of the epoch ends."""
    sizes = [len(source) for source in self._sources]
    if self.weights is not None:
      weights = [float(self.weights[name]) for name in self.parts]
      # So long that even the part with the most examples for its weight is shown whole.
      unit = max(size / weight for size, weight in zip(sizes, weights, strict=True))
      sizes = [
        max(size, round(unit * weight))
        for size, weight in zip(sizes, weights, strict=True)
      ]
    return np.cumsum(sizes, dtype=np.int64)


def _source(name, spec):
  """The source that one part names; what it says of itself names the part."""
  where = f"config: source.parts.{name}"
  if not isinstance(spec, Mapping) or "type" not in spec:
    raise ValueError(f"{where}: want dict(type=…, …), got {spec!r}.")
  fields = dict(spec)
  kind = fields.pop("type")
  kinds = sorted(f.stem for f in HERE.glob("*.py") if f.stem != "__init__")
  if ":" in str(kind):
    module, _, cls = kind.partition(":")
  elif kind in kinds:
    module, cls = f"vlp_jax.data.sources.{kind}", "Source"
  else:
    raise ValueError(f"{where}.type={kind!r}: there are {', '.join(kinds)}.")
  try:
    made = getattr(importlib.import_module(module), cls)
  except (ModuleNotFoundError, AttributeError) as error:
    raise ValueError(f"{where}.type={kind!r}: {error}.") from error
  known = {field.name for field in dataclasses.fields(made)}
  unknown = sorted(set(fields) - known)
  if unknown:
    raise ValueError(
      f"{where}.{unknown[0]}: no such field of {kind} (fields:"
      f" {', '.join(sorted(known))})."
    )
  try:
    return made(**fields)
  except TypeError as error:
    raise ValueError(f"{where}: {error}.") from error
