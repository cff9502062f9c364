"""Pictures beside the page."""

from collections.abc import Callable
import io
import pathlib
from typing import Any
import zipfile

import numpy as np
from PIL import Image
from PIL import ImageDraw

from vlp_jax.data import regions
from vlp_jax.explain import attention

SIDE = 224  # of a saved picture: sharp at 112 CSS pixels on a dense screen
SMALL = 128  # up to this side a picture is drawn, not photographed: PNG

Reader = Callable[[int], np.ndarray]


def reader(source: Any) -> Reader:
  """example index -> uint8 [H, W, 3], as the data source has it.

  Where that is regions of a detector, their boxes are drawn, the surer the darker.
  """

  def read(index: int) -> np.ndarray:
    (example,) = source.read(np.array([index]))
    if zipfile.is_zipfile(io.BytesIO(example["image"])):
      return boxes(regions.load(example["image"]))
    with Image.open(io.BytesIO(example["image"])) as image:
      return np.asarray(image.convert("RGB"))

  return read


def boxes(found: dict[str, np.ndarray]) -> np.ndarray:
  """uint8 [SIDE, SIDE, 3]: the boxes of an image's regions (`data/regions.py`)."""
  picture = Image.new("L", (SIDE, SIDE), 255)
  pen = ImageDraw.Draw(picture)
  corners = regions.uniter_places(found)[:, :4].clip(0.0, 1.0) * (SIDE - 1)
  sure = found.get("conf", np.ones(len(corners), np.float32)).clip(0.0, 1.0)
  for i in np.argsort(sure):
    left, top, right, bottom = (float(x) for x in corners[i])
    box = (left, top, max(left, right), max(top, bottom))
    pen.rectangle(box, outline=int(220 * (1.0 - sure[i])))
  return np.asarray(picture.convert("RGB"))


def save(image: np.ndarray, path: pathlib.Path) -> pathlib.Path:
  """Writes uint8 [H, W, 3] with sides of SIDE at most; the suffix tells the format."""
  small = max(image.shape[:2]) <= SMALL
  picture = Image.fromarray(image)
  if small:
    # Whole multiples keep the edges of drawings.
    times = max(1, SIDE // max(picture.size))
    picture = picture.resize(
      (picture.width * times, picture.height * times), Image.Resampling.NEAREST
    )
  else:
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
  path = path.with_suffix(".png" if small else ".jpg")
  picture.save(path, **({} if small else {"quality": 90, "subsampling": 0}))
  return path


def heated(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
  """An image uint8 [R, R, 3] under a map [h, w], enlarged to at least SIDE."""
  times = max(1, SIDE // image.shape[0])
  image = image.repeat(times, axis=0).repeat(times, axis=1)
  # Here: a run need not wait for it at its start.
  import matplotlib

  colours = matplotlib.colormaps["YlOrRd"](np.linspace(0.0, 1.0, 256))[:, :3]
  return attention.overlay(image, attention.upsample(heat, image.shape[0]), colours)
