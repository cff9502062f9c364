"""RandAugment (Cubuk et al. 2019, arXiv:1909.13719) as ALBEF and BLIP use it: ten ops.

Facts from https://github.com/salesforce/ALBEF dataset/randaugment.py: which ops, how a
level becomes a magnitude, that each op is skipped with even chance, that grey fills
what comes in from outside. Two of its functions do not do what they say, and ours do
what Pillow does: AutoContrast there makes a channel white whose darkest value is above
0 (it negates a uint8), and Sharpness lets values below 0 and above 255 wrap around.
"""

import math

import numpy as np
from PIL import Image
from PIL import ImageOps

FILL = 128
MAX_LEVEL = 10
# At the highest level:
SHEAR = 0.3
TRANSLATE = 10.0  # pixels, whatever the size of the image
ROTATE = 30.0  # degrees


def augment(
  image: np.ndarray, rng: np.random.Generator, *, count: int, level: float
) -> np.ndarray:
  """uint8 [H, W, 3] -> the same shape: `count` ops drawn with replacement."""
  names = list(OPS)
  for name in rng.choice(len(names), count):
    # Always drawn, so that what follows does not depend on the op.
    skip, sign = rng.random(), rng.random()
    if skip > 0.5:
      continue
    image = apply(image, names[name], level, negative=sign > 0.5)
  return image


def apply(image: np.ndarray, name: str, level: float, *, negative: bool) -> np.ndarray:
  """One op at a level; `negative` turns the sign of those that have one."""
  share = level / MAX_LEVEL
  return OPS[name](np.ascontiguousarray(image), share, -share if negative else share)


# --- The ops: (uint8 [H, W, 3], share of the highest level, the same with a sign) -----


def _identity(image, share, signed):
  return image


def _autocontrast(image, share, signed):
  return np.asarray(ImageOps.autocontrast(Image.fromarray(image)))


def _equalize(image, share, signed):
  return np.asarray(ImageOps.equalize(Image.fromarray(image)))


def _brightness(image, share, signed):
  table = np.arange(256, dtype=np.float32) * (1.8 * share + 0.1)
  return table.clip(0, 255).astype(np.uint8)[image]


def _sharpness(image, share, signed):
  """A blend with a 3 x 3 blur (5 in the middle, of 13); the border is left as it is."""
  factor = 1.8 * share + 0.1
  x = image.astype(np.float32)
  height, width = x.shape[:2]
  rows = x[: height - 2] + x[1 : height - 1] + x[2:]
  total = rows[:, : width - 2] + rows[:, 1 : width - 1] + rows[:, 2:]
  inner = x[1:-1, 1:-1]
  blurred = np.rint((total + 4 * inner) / 13)
  out = image.copy()
  out[1:-1, 1:-1] = (blurred + factor * (inner - blurred)).clip(0, 255)
  return out


def _shear_x(image, share, signed):
  return _affine(image, (1.0, -signed * SHEAR, 0.0), (0.0, 1.0, 0.0))


def _shear_y(image, share, signed):
  return _affine(image, (1.0, 0.0, 0.0), (-signed * SHEAR, 1.0, 0.0))


def _translate_x(image, share, signed):
  return _affine(image, (1.0, 0.0, signed * TRANSLATE), (0.0, 1.0, 0.0))


def _translate_y(image, share, signed):
  return _affine(image, (1.0, 0.0, 0.0), (0.0, 1.0, signed * TRANSLATE))


def _rotate(image, share, signed):
  """Counter-clockwise where the sign is positive, about (W / 2, H / 2)."""
  angle = math.radians(signed * ROTATE)
  cos, sin = math.cos(angle), math.sin(angle)
  y, x = image.shape[0] / 2, image.shape[1] / 2
  return _affine(
    image, (cos, -sin, x - cos * x + sin * y), (sin, cos, y - sin * x - cos * y)
  )


# In the order of the official list.
OPS = {
  "identity": _identity,
  "autocontrast": _autocontrast,
  "equalize": _equalize,
  "brightness": _brightness,
  "sharpness": _sharpness,
  "shear_x": _shear_x,
  "shear_y": _shear_y,
  "translate_x": _translate_x,
  "translate_y": _translate_y,
  "rotate": _rotate,
}


def _affine(image, to_x, to_y):
  """Pixel (x, y) of the result is (ax + by + c, dx + ey + f) of the image, bilinear.

  As OpenCV counts, pixels are points at whole numbers, and those beyond the edge grey.
  """
  height, width, _ = image.shape
  framed = np.full((height + 2, width + 2, 3), FILL, np.uint8)
  framed[1:-1, 1:-1] = image
  # To Pillow pixels are squares: the middle of the first is (0.5, 0.5), and with the
  # frame (1.5, 1.5).
  (a, b, c), (d, e, f) = to_x, to_y
  c, f = c + 1.5 - (a + b) / 2, f + 1.5 - (d + e) / 2
  moved = Image.fromarray(framed).transform(
    (width, height),
    Image.Transform.AFFINE,
    (a, b, c, d, e, f),
    Image.Resampling.BILINEAR,
    fillcolor=(FILL,) * 3,
  )
  return np.asarray(moved)
