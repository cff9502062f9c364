"""What a detector would find in a rendered scene: regions of its things, and of ground.

So that methods on regions (UNITER, VLP) are tried where there is neither a detector nor
its files. All of it is drawn by the generator that is handed in; the file is that of
data/regions.py.
"""

import functools
import io

import numpy as np
from PIL import Image

from vlp_jax.data import scenes

MOST_THINGS = 2
FEATURES = 64
SIDE = 6  # a region is looked at in so many by so many pixels
# The first is the ground: there is no thing.
CLASSES = ("ground", *(f"{c} {s}" for c in scenes.COLOURS for s in scenes.SHAPES))
SURE, UNSURE = 0.9, 0.3  # confidence of things and of ground, about


def file(
  image: np.ndarray,
  boxes: np.ndarray,
  described: scenes.Scene,
  count: int,
  rng: np.random.Generator,
) -> bytes:
  """An .npz of `count` regions, the surest first: the things, then parts of the ground.

  Args:
    image: uint8 [R, R, 3]. boxes: float32 [T, 4] of its things, in pixels.
    described: what the things are.
    count: T or more.
  """
  side = image.shape[0]
  names = [f"{thing.colour} {thing.shape}" for thing in described.things]
  # The things come in any order: what is told first is not told by its place.
  order = rng.permutation(len(names))
  boxes, names = boxes[order], [names[i] for i in order]
  extra = count - len(names)
  corner = rng.uniform(0.0, 0.7, (extra, 2))
  extent = rng.uniform(0.15, 0.3, (extra, 2))
  ground = np.concatenate([corner, corner + extent], axis=1) * side
  boxes = np.concatenate([boxes, ground]).astype(np.float32)
  labels = _labels(names + ["ground"] * extra, rng)
  sure = np.where(np.arange(count) < len(names), SURE, UNSURE)
  conf = np.sort(sure + rng.uniform(-0.05, 0.05, count))[::-1]
  out = io.BytesIO()
  np.savez(
    out,
    features=np.stack([features(image, box) for box in boxes]).astype(np.float16),
    boxes=boxes,
    size=np.array([side, side], np.float32),
    soft_labels=labels.astype(np.float16),
    conf=conf.astype(np.float32),
  )
  return out.getvalue()


def features(image: np.ndarray, box: np.ndarray) -> np.ndarray:
  """float32 [FEATURES] of the pixels of a box: random directions of them, cut at 0."""
  left, top, right, bottom = (float(x) for x in box)
  # Half a pixel at least, as boxes of ground may lie anywhere.
  area = (left, top, max(right, left + 0.5), max(bottom, top + 0.5))
  picture = Image.fromarray(image)
  small = picture.resize((SIDE, SIDE), Image.Resampling.BOX, box=_inside(area, picture))
  pixels = np.asarray(small, np.float32).reshape(-1) / 127.5 - 1.0
  return np.maximum(pixels @ _directions(), 0.0)


@functools.cache
def _directions():
  """float32 [SIDE * SIDE * 3, FEATURES], the same everywhere."""
  rows = SIDE * SIDE * 3
  rng = np.random.default_rng(1909_11740)
  return (rng.normal(size=(rows, FEATURES)) * (2 / rows) ** 0.5).astype(np.float32)


def _inside(box, picture):
  left, top, right, bottom = box
  return left, top, min(right, picture.width), min(bottom, picture.height)


def _labels(names, rng):
  """float32 [R, C]: mostly the class that it is, the rest on any other."""
  right = [CLASSES.index(name) for name in names]
  rest = rng.dirichlet(np.full(len(CLASSES), 0.1), len(names))
  share = rng.uniform(0.8, 0.98, (len(names), 1))
  labels = (1.0 - share) * rest
  labels[np.arange(len(names)), right] += share[:, 0]
  return labels.astype(np.float32)
