"""From the bytes of a file to uint8 RGB, by Pillow: strict, bounded, any thread.

The format is read from the bytes, never from the file's name. Pillow is what the
official preprocessing of ALBEF, BLIP and CLIP uses, and resizes faster than
tf.image.resize with antialiasing.
"""

import io
import struct
import warnings

import numpy as np
from PIL import BmpImagePlugin
from PIL import GifImagePlugin
from PIL import Image
from PIL import JpegImagePlugin
from PIL import PngImagePlugin
from PIL import WebPImagePlugin

# Beyond this an image is taken for a decompression bomb, by its header alone.
MAX_PIXELS = 64_000_000
MAX_SIDE = 30_000
FORMATS = "JPEG, PNG, GIF, BMP or WEBP"


class BrokenImageError(ValueError):
  """Bytes that are no image which can be used; the text says why, in few words."""


def open_image(data: bytes) -> Image.Image:
  """The image of a file, of which only the header has been read.

  Raises:
    BrokenImageError: empty, of no known format, damaged, or too large.
  """
  if not data:
    raise BrokenImageError("empty file")
  try:
    # Not Image.open: it tries every format that Pillow knows, and warns of bombs where
    # we refuse them.
    image = _plugin(data)(io.BytesIO(data))
  except BrokenImageError:
    raise
  except MemoryError:
    raise
  except Exception as error:  # plugins raise anything on bytes that are no image
    raise BrokenImageError(f"damaged image header ({_short(error)})") from error
  _check_size(*image.size)
  return image


def load(image: Image.Image) -> Image.Image:
  """Decodes an opened image to mode RGB.

  Raises:
    BrokenImageError: it is truncated or damaged.
  """
  try:
    image.load()
    if image.mode == "P":
      # Pillow warns where a palette has transparent entries; their colours are the same
      # by this way.
      image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")
  except MemoryError:
    raise
  except Exception as error:
    text = _short(error)
    what = "truncated image" if "truncated" in text else "damaged image"
    raise BrokenImageError(f"{what} ({text})") from error


def decode(data: bytes) -> np.ndarray:
  """uint8 [H, W, 3] of a file; raises BrokenImageError."""
  return np.asarray(load(open_image(data)))


def crop_and_resize(
  image: Image.Image, window: tuple[int, int, int, int], size: tuple[int, int]
) -> np.ndarray:
  """Cuts a window out of an image and resizes it, bicubic with antialiasing.

  A JPEG that was opened but not decoded is decoded at 1/2, 1/4 or 1/8 of its size where
  the window is so many times larger than what is wanted.

  Args:
    image: opened or decoded.
    window: top, left, height, width.
    size: height, width of the result.
  """
  top, left, height, width = window
  full = image.size
  shrink = max(1, min(height // size[0], width // size[1]))
  if shrink > 1 and isinstance(image, JpegImagePlugin.JpegImageFile):
    image.draft(None, (max(1, full[0] // shrink), max(1, full[1] // shrink)))
  image = load(image)
  x, y = image.width / full[0], image.height / full[1]
  box = (left * x, top * y, (left + width) * x, (top + height) * y)
  left, top, right, bottom = (round(edge) for edge in box)
  box = (left, top, max(right, left + 1), max(bottom, top + 1))
  if box != (0, 0, *image.size):
    image = image.crop(box)
  return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC))


def _plugin(data):
  head = data[:16]
  if head.startswith(b"\xff\xd8\xff"):
    return JpegImagePlugin.JpegImageFile
  if head.startswith(b"\x89PNG\r\n\x1a\n"):
    if len(data) >= 24:
      _check_size(*struct.unpack(">II", data[16:24]))
    return PngImagePlugin.PngImageFile
  if head.startswith((b"GIF87a", b"GIF89a")):
    return GifImagePlugin.GifImageFile
  if head.startswith(b"BM"):
    return BmpImagePlugin.BmpImageFile
  if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
    _check_size(*_webp_size(data))
    return WebPImagePlugin.WebPImageFile
  raise BrokenImageError(f"not a {FORMATS} file")


def _webp_size(data):
  """Width and height; Pillow's plugin makes the whole canvas when it opens a file."""
  kind, body = data[12:16], data[20:30]
  if len(body) < 10:
    raise BrokenImageError("truncated image (header)")
  if kind == b"VP8X":
    return tuple(1 + int.from_bytes(body[i : i + 3], "little") for i in (4, 7))
  if kind == b"VP8L":
    bits = int.from_bytes(body[1:5], "little")
    return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
  return tuple(side & 0x3FFF for side in struct.unpack("<HH", body[6:10]))


def _check_size(width, height):
  if width < 1 or height < 1:
    raise BrokenImageError("image without pixels")
  if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
    raise BrokenImageError("image too large")


def _short(error):
  text = " ".join(str(error).split())
  return f"{type(error).__name__}: {text}"[:80]
