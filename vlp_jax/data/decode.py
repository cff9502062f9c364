"""From the bytes of a file to uint8 RGB, by Pillow: strict, bounded, any thread.

The format is read from the bytes, never from the file's name. Pillow is what the
official preprocessing of ALBEF, BLIP and CLIP uses, and resizes faster than
tf.image.resize with antialiasing.
"""

import io
import struct
from typing import NamedTuple

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


class BadRecordError(ValueError):
  """A record that cannot be used.

  Attributes:
    reason: in the same few words for all records of the kind, to count by.
  """

  def __init__(self, reason: str, detail: str = ""):
    super().__init__(f"{reason} ({detail})" if detail else reason)
    self.reason = reason


class File(NamedTuple):
  """An image file, of which nothing has been read yet."""

  data: bytes


def open_image(data: bytes) -> Image.Image:
  """The image of a file, of which only the header has been read.

  Raises:
    BadRecordError: empty, of no known format, damaged, or too large.
  """
  if not data:
    raise BadRecordError("empty file")
  try:
    # Not Image.open: it tries every format that Pillow knows, and warns of bombs where
    # we refuse them.
    image = _plugin(data)(io.BytesIO(data))
  except BadRecordError:
    raise
  except MemoryError:
    raise
  except Exception as error:  # plugins raise anything on bytes that are no image
    raise BadRecordError(*_reason(error)) from error
  check_size(*image.size)
  return image


def load(image: Image.Image) -> Image.Image:
  """Decodes an opened image to mode RGB.

  Raises:
    BadRecordError: it is truncated or damaged.
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
    raise BadRecordError(*_reason(error)) from error


def load_window(
  image: Image.Image, box: tuple[int, int, int, int], size: tuple[int, int]
) -> tuple[Image.Image, tuple[int, int, int, int]]:
  """Decodes an opened image of which a part is wanted at a size.

  A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where the part stays at least as
  large as what is wanted.

  Args:
    image: opened, or decoded already.
    box: left, top, right, bottom of the part.
    size: width and height that it will be resized to.

  Returns:
    the image, and where the part is in it.
  """
  left, top, right, bottom = box
  width, height = image.size
  shrink = min((right - left) // size[0], (bottom - top) // size[1])
  if shrink > 1 and isinstance(image, JpegImagePlugin.JpegImageFile):
    image.draft(None, (max(1, width // shrink), max(1, height // shrink)))
  image = load(image)
  return image, scaled(box, (width, height), image.size)


def scaled(
  box: tuple[int, int, int, int], old: tuple[int, int], new: tuple[int, int]
) -> tuple[int, int, int, int]:
  """A box in an image of size `old`, (width, height), once it is of size `new`."""
  left, top, right, bottom = box
  x, y = new[0] / old[0], new[1] / old[1]
  left, top = round(left * x), round(top * y)
  right, bottom = max(round(right * x), left + 1), max(round(bottom * y), top + 1)
  return left, top, right, bottom


def _plugin(data):
  head = data[:16]
  if head.startswith(b"\xff\xd8\xff"):
    return JpegImagePlugin.JpegImageFile
  if head.startswith(b"\x89PNG\r\n\x1a\n"):
    if len(data) >= 24:
      check_size(*struct.unpack(">II", data[16:24]))
    return PngImagePlugin.PngImageFile
  if head.startswith((b"GIF87a", b"GIF89a")):
    return GifImagePlugin.GifImageFile
  if head.startswith(b"BM"):
    return BmpImagePlugin.BmpImageFile
  if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
    check_size(*_webp_size(data))
    return WebPImagePlugin.WebPImageFile
  raise BadRecordError("no image", f"its bytes are of no {FORMATS} file")


def _webp_size(data):
  """Width and height; Pillow's plugin makes the whole canvas when it opens a file."""
  kind, body = data[12:16], data[20:30]
  if len(body) < 10:
    raise BadRecordError("truncated image")
  if kind == b"VP8X":
    return tuple(1 + int.from_bytes(body[i : i + 3], "little") for i in (4, 7))
  if kind == b"VP8L":
    bits = int.from_bytes(body[1:5], "little")
    return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
  return tuple(side & 0x3FFF for side in struct.unpack("<HH", body[6:10]))


def check_size(width: int, height: int) -> None:
  """Raises BadRecordError for an image without pixels, or with too many."""
  if width < 1 or height < 1:
    raise BadRecordError("image without pixels")
  if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
    raise BadRecordError("image too large", f"{width}×{height} pixels")


def _reason(error):
  """(reason, detail) of what Pillow raised."""
  text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:80]
  cut = ("truncated", "unexpected end")
  what = "truncated" if any(word in text.lower() for word in cut) else "damaged"
  return f"{what} image", text
