"""Compositional scenes: a description, and from it both a picture and a caption.

A scene is one thing at a place ("a large green star in the top left") or two things in
a relation ("a small red circle left of a large blue square"). The caption determines
the description, and the picture shows it and nothing else, so retrieval has one right
answer. To find it, a model must bind each colour and size to its shape.

Every example is a function of (seed, split, index). data/drawing.py draws it.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools

import numpy as np

SIZES = ("small", "large")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# Hue in degrees, saturation, value: apart from each other and from a light background.
COLOURS = {
  "red": (358, 0.88, 0.86),
  "orange": (27, 0.95, 0.98),
  "yellow": (54, 0.95, 0.95),
  "green": (130, 0.75, 0.60),
  "blue": (220, 0.85, 0.90),
  "purple": (276, 0.75, 0.66),
  "pink": (325, 0.50, 1.00),
  "black": (0, 0.00, 0.12),
}
# Of the picture's side: the diameter's smallest and largest share.
DIAMETERS = {"small": (0.22, 0.26), "large": (0.40, 0.44)}
# Where a single thing's centre is, as (x, y) shares of the picture's side.
PLACES = {
  "in the top left": (0.24, 0.24),
  "at the top": (0.50, 0.24),
  "in the top right": (0.76, 0.24),
  "on the left": (0.24, 0.50),
  "in the middle": (0.50, 0.50),
  "on the right": (0.76, 0.50),
  "in the bottom left": (0.24, 0.76),
  "at the bottom": (0.50, 0.76),
  "in the bottom right": (0.76, 0.76),
}
# The first thing to the second. "right of" and "below" are the same scenes told from
# the other side, so that a description is not counted twice.
RELATIONS = ("left", "above")
PLACE_TEMPLATES = ("a {a} {place}", "there is a {a} {place}", "{place} there is a {a}")
RELATION_TEMPLATES = {
  "left": (
    "a {a} left of a {b}",
    "a {a} to the left of a {b}",
    "there is a {a} to the left of a {b}",
    "a {a} with a {b} to its right",
    "a {b} right of a {a}",
    "a {b} to the right of a {a}",
    "there is a {b} to the right of a {a}",
    "a {b} with a {a} to its left",
  ),
  "above": (
    "a {a} above a {b}",
    "a {a} placed above a {b}",
    "there is a {a} above a {b}",
    "a {a} with a {b} below it",
    "a {b} below a {a}",
    "a {b} placed below a {a}",
    "there is a {b} below a {a}",
    "a {b} with a {a} above it",
  ),
}
SPLITS = ("train", "val", "test")
HELD_OUT = 500  # descriptions each of val and test


@dataclasses.dataclass(frozen=True)
class Thing:
  """One drawn object; `str(thing)` is its noun phrase without the article."""

  size: str
  colour: str
  shape: str

  def __str__(self) -> str:
    return f"{self.size} {self.colour} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Scene:
  """A description. One thing and a key of PLACES, or two and one of RELATIONS."""

  things: tuple[Thing, ...]
  where: str


THINGS = tuple(Thing(s, c, f) for s in SIZES for c in COLOURS for f in SHAPES)
ONE_COUNT = len(THINGS) * len(PLACES)
TWO_COUNT = len(THINGS) * (len(THINGS) - 1) * len(RELATIONS)
_PLACE_OF = {thing: i for i, thing in enumerate(THINGS)}
COUNT = ONE_COUNT + TWO_COUNT  # all descriptions; the ones of one thing come first


def scene(number: int) -> Scene:
  """The description of this number, 0 … COUNT - 1."""
  if not 0 <= number < COUNT:
    raise ValueError(f"scene {number}: want 0 … {COUNT - 1}.")
  if number < ONE_COUNT:
    thing, place = divmod(number, len(PLACES))
    return Scene((THINGS[thing],), tuple(PLACES)[place])
  pair, relation = divmod(number - ONE_COUNT, len(RELATIONS))
  first, second = divmod(pair, len(THINGS) - 1)
  second += second >= first  # never twice the same thing
  return Scene((THINGS[first], THINGS[second]), RELATIONS[relation])


def number_of(described: Scene) -> int:
  """The inverse of `scene`."""
  first, *rest = (_PLACE_OF[thing] for thing in described.things)
  if not rest:
    return first * len(PLACES) + tuple(PLACES).index(described.where)
  (second,) = rest
  pair = first * (len(THINGS) - 1) + second - (second > first)
  return ONE_COUNT + pair * len(RELATIONS) + RELATIONS.index(described.where)


def attribute_words() -> frozenset[str]:
  """Every word of a caption that only the picture can tell."""
  words = {*SIZES, *COLOURS, *SHAPES, "left", "right", "above", "below"}
  for place in PLACES:
    words.update(place.split()[2:])
  return frozenset(words)


_ATTRIBUTES = attribute_words()


def captions(described: Scene) -> list[str]:
  """All the ways to say it."""
  if len(described.things) == 1:
    (a,) = described.things
    return [t.format(a=a, place=described.where) for t in PLACE_TEMPLATES]
  a, b = described.things
  return [t.format(a=a, b=b) for t in RELATION_TEMPLATES[described.where]]


def words(caption: str) -> list[str]:
  """The caption's words that depend on the picture, in its order."""
  return [word for word in caption.split() if word in _ATTRIBUTES]


# --- Splits ---------------------------------------------------------------------------


def bag(described: Scene) -> tuple:
  """The same for scenes that differ only in what is bound to what."""
  sizes, colours, shapes = (
    tuple(sorted(getattr(thing, field) for thing in described.things))
    for field in ("size", "colour", "shape")
  )
  return described.where, sizes, colours, shapes


def rivals(number: int) -> list[int]:
  """Scenes of the same words bound differently; or the same one thing elsewhere."""
  described = scene(number)
  if len(described.things) == 1:
    others = [Scene(described.things, place) for place in PLACES]
  else:
    # Which of the two has the first size, the first colour and the first shape.
    others = [
      Scene((Thing(s[a], c[b], f[d]), Thing(s[1 - a], c[1 - b], f[1 - d])), where)
      for where, s, c, f in [bag(described)]
      for a, b, d in itertools.product((0, 1), repeat=3)
    ]
  return sorted({number_of(other) for other in others} - {number})


def split(name: str, *, one: float = 0.2, twins: float = 0.5) -> np.ndarray:
  """Numbers of the descriptions in a split, int32; the three splits share none.

  Held out by a hash of the description, so it depends on no seed. `val` and `test`
  hold 500 descriptions each, once, in the hash's order; `train` holds all others, in
  ascending order.

  Args:
    name: "train", "val" or "test".
    one: share of scenes with one thing in val and test.
    twins: share of the scenes of two things in val and test that come beside another
      of the same words, bound differently ("a small red circle left of a large blue
      square" and "a large red circle left of a small blue square"): who hears only a
      bag of words can do no better than guess between the two.
  """
  if name not in SPLITS:
    raise ValueError(f'split="{name}": scenes have {", ".join(SPLITS)}.')
  for field, value in (("one", one), ("twins", twins)):
    if not 0.0 <= value <= 1.0:
      raise ValueError(f"{field}={value}: a share, want 0 … 1.")
  # Some descriptions of one thing must stay in train.
  most = (ONE_COUNT - 100) / 2 / HELD_OUT
  if one > most:
    raise ValueError(
      f"one={one}: val and test would leave train too few of the {ONE_COUNT}"
      f" descriptions of one thing; want at most {most:.2f}."
    )
  return _splits(one, twins)[name]


@functools.lru_cache(maxsize=4)
def _splits(one, twins):
  """{name: int32 numbers}."""
  described = [scene(number) for number in range(COUNT)]
  order = sorted(range(COUNT), key=lambda number: _hash(described[number]))
  singles = iter([n for n in order if n < ONE_COUNT])
  pairs = iter([n for n in order if n >= ONE_COUNT])
  families = collections.defaultdict(list)
  for number in order:
    families[bag(described[number])].append(number)
  used = set()  # the families of two things that val or test took from
  place = {number: i for i, number in enumerate(order)}
  splits = {}
  for name in SPLITS[1:]:
    chosen = list(itertools.islice(singles, round(one * HELD_OUT)))
    with_twin = round(twins * (HELD_OUT - len(chosen)) / 2)
    while len(chosen) < HELD_OUT:
      number = next(pairs)
      words_bag = bag(described[number])
      family = families[words_bag]
      if words_bag in used or (with_twin and len(family) < 2):
        continue
      used.add(words_bag)
      chosen += family[:2] if with_twin else [number]
      with_twin -= bool(with_twin)
    chosen = chosen[:HELD_OUT]
    splits[name] = np.array(sorted(chosen, key=place.get), np.int32)
  held_out = {*splits["val"].tolist(), *splits["test"].tolist()}
  rest = [number for number in range(COUNT) if number not in held_out]
  return {"train": np.array(rest, np.int32), **splits}


def _hash(described) -> bytes:
  """Well mixed, and bound to what the scene is rather than to its number."""
  words_in_order = " ".join(map(str, (*described.things, described.where)))
  return hashlib.blake2b(words_in_order.encode(), digest_size=8).digest()


def size_of(name: str, size: int | None = None) -> int:
  """Number of examples of a split: `size`, or the usual one."""
  if name not in SPLITS:
    raise ValueError(f'split="{name}": scenes have {", ".join(SPLITS)}.')
  if size is None:
    return 60_000 if name == "train" else HELD_OUT
  if size < 1 or (name != "train" and size > HELD_OUT):
    most = "" if name == "train" else f" … {HELD_OUT}"
    raise ValueError(f'size={size} of scenes split "{name}": want 1{most}.')
  return size


# --- Examples -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Example:
  """One example before it is drawn.

  Attributes:
    number: of the description.
    caption: one way to say it.
    rng: for `drawing.draw`.
  """

  number: int
  caption: str
  rng: np.random.Generator


def example(
  name: str,
  index: int,
  numbers: np.ndarray,
  *,
  seed: int,
  one: float,
  rivalry: float = 0.0,
) -> Example:
  """Example `index` of a split, whose descriptions are `numbers`, see `split`.

  Val and test hold each of their descriptions once. In train, `one` is the share of
  scenes with one thing, and `rivalry` that of odd examples which are one of `rivals`
  of the example before them.
  """
  rng = _rng(name, index, seed)
  if name == "train":
    number = _draw(rng, numbers, one)
    if rivalry and index % 2 and rng.random() < rivalry:
      before = _draw(_rng(name, index - 1, seed), numbers, one)
      pool = [n for n in rivals(before) if _holds(numbers, n)] or [number]
      number = pool[int(rng.random() * len(pool))]
  else:
    number = int(numbers[index])
  sayings = captions(scene(number))
  return Example(number, sayings[int(rng.random() * len(sayings))], rng)


def _rng(name, index, seed):
  return np.random.default_rng((seed, SPLITS.index(name), index))


def _draw(rng, numbers, one):
  singles = np.searchsorted(numbers, ONE_COUNT)
  pool = numbers[:singles] if rng.random() < one else numbers[singles:]
  return int(pool[int(rng.random() * len(pool))])


def _holds(numbers, number):
  """Whether a number is among ascending ones."""
  at = np.searchsorted(numbers, number)
  return at < len(numbers) and numbers[at] == number
