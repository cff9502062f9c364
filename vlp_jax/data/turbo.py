"""Windows of JPEGs by libjpeg-turbo and OpenCV: several times Pillow's rate.

Not Pillow's pixels: enlarged by OpenCV's bicubic kernel (a = -0.75, Pillow's is -0.5)
and shrunk by the mean of the area, and a JPEG may be decoded at any eighth of its size.
What is passed over is the same: a file that is not quite as it should be goes to
Pillow, which decides.

Wants the packages simplejpeg and opencv-python-headless (pip install "vlp-jax[fast]").
"""

import dataclasses
import functools
import math
import sys
from types import ModuleType

import numpy as np
from PIL import Image

from vlp_jax.data import decode as decode_lib

# What libjpeg-turbo makes RGB of as Pillow does.
COLOURS = ("YCbCr", "Gray")


@dataclasses.dataclass(frozen=True)
class Jpeg:
  """A JPEG of which only the header has been read; size is (width, height)."""

  data: bytes
  size: tuple[int, int]


def opened(data: bytes) -> Jpeg | Image.Image:
  """An image file of which only the header has been read: Pillow's, if it is no JPEG.

  Raises:
    BadRecordError: as `decode.open_image`.
  """
  _, simplejpeg = packages()
  if data.startswith(b"\xff\xd8\xff"):
    try:
      height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
      colours = None
    if colours in COLOURS:
      decode_lib.check_size(width, height)
      return Jpeg(data, (width, height))
  return decode_lib.open_image(data)


def window(
  image: Jpeg | Image.Image, box: tuple[int, int, int, int], size: int
) -> np.ndarray:
  """uint8 [size, size, 3] of a part of an image.

  Args:
    image: opened, or decoded already.
    box: left, top, right, bottom of the part.

  Raises:
    BadRecordError: the file is damaged.
  """
  cv2, _ = packages()
  pixels, (left, top, right, bottom) = _decoded(image, box, size)
  part = pixels[top:bottom, left:right]
  smaller = min(part.shape[:2]) > size
  kernel = cv2.INTER_AREA if smaller else cv2.INTER_CUBIC
  return cv2.resize(part, (size, size), interpolation=kernel)


def mirrored(image: np.ndarray) -> np.ndarray:
  """uint8 [H, W, 3], left for right.

  Both ways make the same bytes; OpenCV, where a word has asked for it, is faster.
  """
  if "cv2" in sys.modules:
    return sys.modules["cv2"].flip(image, 1)
  # A channel at a time: numpy copies them together five times slower.
  out = np.empty_like(image)
  for channel in range(image.shape[-1]):
    out[..., channel] = image[:, ::-1, channel]
  return out


@functools.cache
def packages() -> tuple[ModuleType, ModuleType]:
  """(cv2, simplejpeg).

  Raises:
    ValueError: one is not installed; says how to get them, or do without.
  """
  try:
    # Here: the exact way needs neither.
    import cv2
    import simplejpeg
  except ImportError as error:
    raise ValueError(
      f'by="turbo" wants a package that is not installed ({error.name}): pip install'
      ' "vlp-jax[fast]", or leave it out: by="pillow" needs none.'
    ) from error
  # Batches are made side by side: threads within an image would only get in the way.
  cv2.setNumThreads(0)
  return cv2, simplejpeg


def _decoded(image, box, size):
  """(uint8 [H, W, 3], where the part is in it), at a reduced scale where it can be."""
  if isinstance(image, Jpeg):
    pixels = _turbo(image, box, size)
    if pixels is not None:
      return pixels, decode_lib.scaled(box, image.size, pixels.shape[1::-1])
    image = decode_lib.open_image(image.data)
  image, box = decode_lib.load_window(image, box, (size, size))
  return np.asarray(image), box


def _turbo(image, box, size):
  """Pixels of a whole JPEG, at a scale at which the part is as large as is wanted.

  None: libjpeg-turbo has something to say against the file.
  """
  _, simplejpeg = packages()
  left, top, right, bottom = box
  shrink = max(1.0, min(right - left, bottom - top) / size)
  width, height = (math.ceil(side / shrink) for side in image.size)
  try:
    return simplejpeg.decode_jpeg(image.data, "RGB", min_height=height, min_width=width)
  except ValueError:
    return None
