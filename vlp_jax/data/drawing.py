"""Draws a scene: anti-aliased shapes on a light ground, varied within its words.

numpy and Pillow only; a few hundred microseconds a picture.
"""

import colorsys
import functools
import io
import math

import numpy as np
from PIL import Image
from PIL import ImageDraw

from vlp_jax.data import scenes

MIN_RES = 24  # a small star is five pixels wide here, and still a star


@functools.lru_cache(maxsize=512)
def shape_mask(shape: str, diameter: int) -> np.ndarray:
  """float32 [diameter, diameter, 1], coverage 0 … 1 of each pixel by the shape."""
  fine = 8  # drawn so many times larger: smooth edges
  side = diameter * fine
  canvas = Image.new("L", (side, side))
  pen = ImageDraw.Draw(canvas)
  last = side - 1
  if shape in ("circle", "ring"):
    pen.ellipse((0, 0, last, last), fill=255)
    if shape == "ring":
      hole = round(side * 0.26)
      pen.ellipse((hole, hole, last - hole, last - hole), fill=0)
  elif shape == "square":
    # A little smaller than its box, so that it looks no larger than the circle.
    edge = round(side * 0.05)
    pen.rectangle((edge, edge, last - edge, last - edge), fill=255)
  elif shape == "triangle":
    pen.polygon(((0, last), (last, last), (last / 2, 0)), fill=255)
  elif shape == "star":
    angles = np.arange(10) * np.pi / 5
    radius = np.where(np.arange(10) % 2 == 0, 0.53, 0.21) * side
    x = side / 2 + radius * np.sin(angles)
    y = side * 0.53 - radius * np.cos(angles)
    pen.polygon(list(zip(x.tolist(), y.tolist(), strict=True)), fill=255)
  elif shape == "cross":
    edge = round(side * 0.33)
    pen.rectangle((edge, 0, last - edge, last), fill=255)
    pen.rectangle((0, edge, last, last - edge), fill=255)
  else:
    raise ValueError(f'shape="{shape}": want one of {", ".join(scenes.SHAPES)}.')
  fine_mask = np.asarray(canvas, np.float32) / 255
  mask = fine_mask.reshape(diameter, fine, diameter, fine).mean(axis=(1, 3))
  return mask[:, :, None]


def draw(described: scenes.Scene, *, res: int, rng: np.random.Generator) -> np.ndarray:
  """uint8 [res, res, 3]: the scene, with sizes, places, hues and ground varied."""
  return draw_with_boxes(described, res=res, rng=rng)[0]


def draw_with_boxes(
  described: scenes.Scene, *, res: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """(the picture of `draw`, float32 [T, 4] x1, y1, x2, y2 in pixels of its things)."""
  if res < MIN_RES:
    raise ValueError(
      f"res={res}: small shapes look alike below {MIN_RES} pixels; want more."
    )
  # One call for all draws: a generator's calls cost more than the drawing.
  draws = iter(rng.random(32).tolist())

  def between(low, high):
    return low + (high - low) * next(draws)

  image = _background(res, between)
  diameters = [
    max(5, round(res * between(*scenes.DIAMETERS[thing.size])))
    for thing in described.things
  ]
  centres = _centres(described, [d / res for d in diameters], between)
  boxes = []
  for thing, d, (x, y) in zip(described.things, diameters, centres, strict=True):
    left = min(max(round(x * res - d / 2), 0), res - d)
    top = min(max(round(y * res - d / 2), 0), res - d)
    under = image[top : top + d, left : left + d]
    under += shape_mask(thing.shape, d) * (_colour(thing.colour, between) - under)
    boxes.append((left, top, left + d, top + d))
  return (image + 0.5).astype(np.uint8), np.array(boxes, np.float32)


def _background(res, between):
  """float32 [res, res, 3]: a light ground that runs from one tint to another."""
  corners = []
  for _ in range(2):
    tint = colorsys.hsv_to_rgb(between(0, 1), between(0.0, 0.09), between(0.84, 1.0))
    corners.append(255 * np.array(tint, np.float32))
  angle = between(0, 2 * math.pi)
  ramp = np.arange(res, dtype=np.float32) / (res - 1) - 0.5
  rows = np.float32(0.7 * math.sin(angle)) * ramp[:, None, None]
  columns = np.float32(0.7 * math.cos(angle)) * ramp[None, :, None] + np.float32(0.5)
  step = corners[1] - corners[0]
  return corners[0] + columns * step + rows * step


def _colour(name, between):
  """float32 [3] RGB near the colour of that name."""
  hue, saturation, value = scenes.COLOURS[name]
  hue = (hue + between(-5, 5)) / 360 % 1
  saturation = min(1.0, saturation * between(0.92, 1.08))
  value = min(1.0, value * between(0.92, 1.08))
  return 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32)


def _centres(described, diameters, between):
  """(x, y) of each thing, in shares of the side: never touching, relation plain."""
  if len(described.things) == 1:
    x, y = scenes.PLACES[described.where]
    return [(x + between(-0.03, 0.03), y + between(-0.03, 0.03))]
  # Each has its half along the axis of the relation; across it they are level, but
  # for a wobble that is small beside their distance.
  edge, gap = 0.02, 0.04
  level = between(0.34, 0.66)
  along, across = [], []
  for half, d in enumerate(diameters):
    low, high = edge + d / 2, 0.5 - gap / 2 - d / 2
    low, high = max(low, 0.16), min(high, 0.30)
    at = between(low, max(low, high))
    along.append(1 - at if half else at)
    wobble = level + between(-0.05, 0.05)
    across.append(min(max(wobble, edge + d / 2), 1 - edge - d / 2))
  if described.where == "left":
    return list(zip(along, across, strict=True))
  return list(zip(across, along, strict=True))


def png(image: np.ndarray) -> bytes:
  """The picture as a PNG file."""
  file = io.BytesIO()
  Image.fromarray(image).save(file, "PNG", compress_level=1)
  return file.getvalue()
