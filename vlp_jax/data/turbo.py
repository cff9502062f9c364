"""Windows of JPEGs by libjpeg-turbo and OpenCV: several times Pillow's rate.

Not Pillow's pixels: enlarged by OpenCV's bicubic kernel (a = -0.75, Pillow's is -0.5)
and shrunk by the mean of the area, and a JPEG may be decoded at any eighth of its size.
What is passed over is the same: a file that is not quite as it should be goes to
Pillow, which decides.

Wants the packages simplejpeg and opencv-python-headless (pip install "vlp-jax[fast]").
"""

import functools
import sys
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image
from PIL import JpegImagePlugin

from vlp_jax.data import decode as decode_lib

MODES = ("RGB", "L")  # what libjpeg-turbo makes RGB of as Pillow does


def window(
  image: Image.Image | np.ndarray, box: tuple[int, int, int, int], size: int
) -> np.ndarray:
  """uint8 [size, size, 3] of a part of an image.

  Args:
    image: opened by `decode.open_image`, decoded, or pixels uint8 [H, W, 3].
    box: left, top, right, bottom of the part.

  Raises:
    BadRecordError: the file is damaged.
    ImportError: a package is not installed.
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
    ValueError: they are not installed; says how to get them, or do without.
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
  if isinstance(image, np.ndarray):
    return image, box
  pixels = None
  # A file that was opened, and not decoded yet.
  if isinstance(image, JpegImagePlugin.JpegImageFile) and image.mode in MODES:
    pixels = _turbo(image, box, size)
  if pixels is None:
    image, box = decode_lib.load_window(image, box, (size, size))
    return np.asarray(image), box
  x, y = pixels.shape[1] / image.width, pixels.shape[0] / image.height
  left, top, right, bottom = box
  left, top = round(left * x), round(top * y)
  right, bottom = max(round(right * x), left + 1), max(round(bottom * y), top + 1)
  return pixels, (left, top, right, bottom)


def _turbo(image: JpegImagePlugin.JpegImageFile, box, size) -> Any:
  """Pixels of a whole JPEG, at a scale at which the part is as large as is wanted.

  None: libjpeg-turbo has something to say against the file.
  """
  _, simplejpeg = packages()
  left, top, right, bottom = box
  shrink = max(1.0, min(right - left, bottom - top) / size)
  try:
    return simplejpeg.decode_jpeg(
      image.fp.getvalue(),
      "RGB",
      min_height=int(np.ceil(image.height / shrink)),
      min_width=int(np.ceil(image.width / shrink)),
    )
  except ValueError:
    return None
