"""RandAugment as ALBEF and BLIP use it: ten ops, magnitude 0 … 10.

Facts from salesforce/ALBEF dataset/randaugment.py: which ops, how a level becomes a
magnitude, that each op is skipped with even chance, and that grey fills what comes in
from outside. There OpenCV moves the pixels and here Pillow, so moved images may differ
by a grey level or two at edges.
"""

import numpy as np
from PIL import Image
from PIL import ImageOps

FILL = (128, 128, 128)
MAX_LEVEL = 10
TRANSLATE = 10  # pixels at the highest level
NAMES = (
  "identity",
  "autocontrast",
  "equalize",
  "brightness",
  "sharpness",
  "shear_x",
  "shear_y",
  "translate_x",
  "translate_y",
  "rotate",
)


def augment(
  image: np.ndarray, rng: np.random.Generator, *, count: int, level: float
) -> np.ndarray:
  """uint8 [H, W, 3] -> the same shape: `count` ops drawn with replacement."""
  for name in rng.choice(len(NAMES), count):
    # Always drawn, so that what follows does not depend on the op.
    skip, sign = rng.random(), rng.random()
    if skip > 0.5:
      continue
    image = apply(image, NAMES[name], level, negative=sign > 0.5)
  return image


def apply(image: np.ndarray, name: str, level: float, *, negative: bool) -> np.ndarray:
  """One op at a level; `negative` turns the sign of those that have one."""
  share = level / MAX_LEVEL
  sign = -1 if negative else 1
  if name == "identity":
    return image
  if name == "autocontrast":
    return np.asarray(ImageOps.autocontrast(Image.fromarray(image)))
  if name == "equalize":
    return np.asarray(ImageOps.equalize(Image.fromarray(image)))
  if name == "brightness":
    table = (np.arange(256, dtype=np.float32) * (1.8 * share + 0.1)).clip(0, 255)
    return table.astype(np.uint8)[image]
  if name == "sharpness":
    return _sharpness(image, 1.8 * share + 0.1)
  if name == "rotate":
    turned = Image.fromarray(np.ascontiguousarray(image)).rotate(
      sign * 30 * share, Image.Resampling.BILINEAR, fillcolor=FILL
    )
    return np.asarray(turned)
  shift, shear = sign * TRANSLATE * share, sign * 0.3 * share
  # Pillow wants where each output pixel comes from: the inverse of OpenCV's matrix.
  inverse = {
    "shear_x": (1, -shear, 0, 0, 1, 0),
    "shear_y": (1, 0, 0, -shear, 1, 0),
    "translate_x": (1, 0, shift, 0, 1, 0),
    "translate_y": (1, 0, 0, 0, 1, shift),
  }[name]
  picture = Image.fromarray(np.ascontiguousarray(image))
  moved = picture.transform(
    picture.size,
    Image.Transform.AFFINE,
    inverse,
    Image.Resampling.BILINEAR,
    fillcolor=FILL,
  )
  return np.asarray(moved)


def _sharpness(image, factor):
  """A blend with a 3 x 3 blur (5 in the middle, of 13); the border is left as it is."""
  x = image.astype(np.float32)
  total = sum(
    x[1 + i : x.shape[0] - 1 + i, 1 + j : x.shape[1] - 1 + j]
    for i in (-1, 0, 1)
    for j in (-1, 0, 1)
  )
  inner = x[1:-1, 1:-1]
  blurred = np.round((total + 4 * inner) / 13)
  out = x.copy()
  out[1:-1, 1:-1] = blurred + factor * (inner - blurred)
  return out.clip(0, 255).astype(np.uint8)
