"""Rearranging arrays by letters, as in einops, with sizes that a whole table shares.

A side is a list of axes: a letter, a number, or several in parentheses that are one
axis of the array. D' is another axis of the size of D.
"""

import collections
from collections.abc import Iterable, Mapping
import math
import re

import numpy as np

Sizes = Mapping[str, int]
Axes = list[tuple[str, ...]]


def rearrange(
  x: np.ndarray, left: str, right: str, sizes: Sizes | None = None
) -> np.ndarray:
  """Splits, permutes and joins axes: rearrange(x, "D (N H)", "N H D", {"N": 12}).

  Raises:
    ValueError: if x is not of the left side, or a size is left open or contradicted.
  """
  before, after = parse(left), parse(right)
  bound = bind(x.shape, before, sizes or {})
  letters = [letter for axis in before for letter in axis]
  atoms = x.reshape([size(letter, bound) for letter in letters])
  # Sides may differ by axes of size 1, which "1" writes.
  source = [i for i, letter in enumerate(letters) if letter != "1"]
  atoms = atoms.reshape([atoms.shape[i] for i in source])
  order = [letters[i] for i in source]
  moved = [letter for axis in after for letter in axis if letter != "1"]
  atoms = atoms.transpose([order.index(letter) for letter in moved])
  return atoms.reshape([math.prod(size(c, bound) for c in axis) for axis in after])


def parse(side: str) -> Axes:
  """ "D (N H)" -> [("D",), ("N", "H")]."""
  found = re.findall(r"\(([^)]*)\)|(\S+)", side)
  return [tuple((group or single).split()) for group, single in found]


def size(letter: str, sizes: Sizes) -> int:
  """The size of a letter, or the number it is."""
  return int(letter) if letter.isdigit() else sizes[_base(letter)]


def bind(shape: tuple[int, ...], axes: Axes, sizes: Sizes) -> Sizes:
  """Sizes of all letters of a shape; ValueError if it is not one of these axes."""
  if len(shape) != len(axes):
    raise ValueError(f"{len(shape)} axes instead of {len(axes)}")
  bound = dict(sizes)
  for length, axis in zip(shape, axes, strict=True):
    unknown, rest = _unknown(axis, bound)
    if len(unknown) > 1:
      raise ValueError(f"the sizes of {' and '.join(unknown)} are not known")
    if unknown:
      if rest == 0 or length % rest:
        raise ValueError(f"an axis of {length}, not a multiple of {rest}")
      bound[_base(unknown[0])] = length // rest
    elif length != rest:
      raise ValueError(f"an axis {' '.join(axis)} of {length} instead of {rest}")
  return bound


def vote(shapes: Iterable[tuple[tuple[int, ...], str]], sizes: Sizes) -> Sizes:
  """Sizes of letters, each as most arrays have it: a wrong array is then alone.

  Args:
    shapes: (shape, side) of each array; those of another number of axes do not count.
    sizes: letters that are known.
  """
  shapes = [(shape, parse(side)) for shape, side in shapes]
  # Axes of one letter first: what is left in parentheses follows from them.
  for single in (True, False):
    votes = collections.defaultdict(collections.Counter)
    for shape, axes in shapes:
      if len(axes) != len(shape):
        continue
      for length, axis in zip(shape, axes, strict=True):
        unknown, rest = _unknown(axis, sizes)
        if len(unknown) == 1 and single == (len(axis) == 1):
          votes[_base(unknown[0])][length // max(rest, 1)] += 1
    winners = {letter: c.most_common(1)[0][0] for letter, c in votes.items()}
    sizes = {**sizes, **winners}
  return sizes


def _unknown(axis, sizes):
  """(letters of unknown size, product of the known sizes)."""
  unknown = [c for c in axis if not c.isdigit() and _base(c) not in sizes]
  return unknown, math.prod(size(c, sizes) for c in axis if c not in unknown)


def _base(letter):
  """D and D' are two axes of one size."""
  return letter.rstrip("'")
