"""Words of the pp string that work on images, and how files become pixels.

An example is a dict: "image" is the bytes of a file until it is decoded, then uint8
[H, W, 3]; "caption" is a str. A word makes an op: (example, rng) -> example.

Geometry is torchvision's and resampling Pillow's, as in the official code of ALBEF
(dataset/__init__.py), BLIP and CLIP: the same pixels to the last bit. Pillow's bicubic
resize is also twice as fast as tf.image.resize with antialiasing.
"""

from collections.abc import Callable
import math
from typing import Any, Literal

import numpy as np
from PIL import Image

from vlp_jax.data import decode as decode_lib
from vlp_jax.data import randaugment as randaugment_lib
from vlp_jax.data import turbo
from vlp_jax.data.decode import BadRecordError

Example = dict[str, Any]
# A function whose annotation says that it returns an Op is a word of the pp string.
Op = Callable[[Example, np.random.Generator], Example]

TRIES = 10  # torchvision.transforms.RandomResizedCrop.get_params


def decode() -> Op:
  """File -> uint8 [H, W, 3], the first picture of an animation, greys and CMYK as RGB.

  Nothing is decoded before a word asks for it: a crop decodes only what it needs.
  """

  def op(example, rng):
    del rng
    image = example["image"]
    if not isinstance(image, bytes):
      raise ValueError("pp: decode: the image is decoded already: say decode once.")
    return example | {"image": decode_lib.File(image)}

  return op


def resize(size: int) -> Op:
  """To a square, its aspect ratio lost: the official evaluation of ALBEF and BLIP."""
  _check_size(size)

  def op(example, rng):
    del rng
    # The official transform decodes the whole image: no reduced scale.
    image = decode_lib.load(_opened(example, "resize"))
    return example | {"image": _resized(image, (size, size))}

  return op


def resize_shorter(size: int) -> Op:
  """The shorter side to `size`, the aspect ratio kept; torchvision's Resize(int)."""
  _check_size(size)

  def op(example, rng):
    del rng
    image = decode_lib.load(_opened(example, "resize_shorter"))
    width, height = image.size
    if width <= height:
      new = (size, int(size * height / width))
    else:
      new = (int(size * width / height), size)
    return example | {"image": _resized(image, new)}

  return op


def fit(shorter: int, longer: int, multiple: int = 32) -> Op:
  """The shorter side to `shorter`, the longer at most `longer`, on a black canvas.

  Pixel-BERT's resizing as ViLT does it (vilt/transforms/utils.py MinMaxResize): both
  sides are then cut to a multiple of `multiple`. The canvas is a square of `longer`,
  cut so too, with the image in its upper left corner; "image_size" is the image's
  (rows, columns), for encoders that take it. The last word on images.
  """
  _check_size(multiple)
  if not multiple <= shorter <= longer:
    raise ValueError(
      f"shorter={shorter}, longer={longer}: want {multiple} (multiple) <= shorter <="
      " longer."
    )
  side = longer // multiple * multiple

  def op(example, rng):
    del rng
    image = decode_lib.load(_opened(example, "fit"))
    width, height = image.size
    scale = shorter / min(width, height)
    if max(width, height) * scale > longer:
      scale = longer / max(width, height)
    # The official order of roundings.
    size = [int(x * scale + 0.5) // multiple * multiple for x in (width, height)]
    if not all(size):
      raise BadRecordError("too narrow", f"{width}×{height}")
    canvas = np.zeros((side, side, 3), np.uint8)
    canvas[: size[1], : size[0]] = np.asarray(_resized(image, tuple(size)))
    sizes = np.array(size[::-1], np.int32)
    return example | {"image": canvas, "image_size": sizes}

  return op


def naflex(res: int, patch: int) -> Op:
  """Keeps the aspect ratio in at most (res / patch)² patches: NaFlex of SigLIP 2.

  Both sides are multiples of `patch`, as large as the number of patches allows
  (transformers image_processing_siglip2.py get_image_size_for_max_num_patches). The
  patches, by rows, then black ones, are cut into the lines of a square canvas of `res`:
  shapes are static. "image_size" is the grid, (lines, columns) in patches, for
  `models/naflex.py`. The last word on images.
  """
  _check_size(patch)
  if res % patch:
    raise ValueError(f"res={res} is not a multiple of patch={patch}.")
  side = res // patch

  def op(example, rng):
    del rng
    image = decode_lib.load(_opened(example, "naflex"))
    grid = naflex_grid(*image.size[::-1], patch=patch, most=side**2)
    pixels = np.asarray(_resized(image, (grid[1] * patch, grid[0] * patch)))
    row = np.zeros((side**2, patch, patch, 3), np.uint8)
    cut = pixels.reshape(grid[0], patch, grid[1], patch, 3).transpose(0, 2, 1, 3, 4)
    row[: grid[0] * grid[1]] = cut.reshape(-1, patch, patch, 3)
    canvas = row.reshape(side, side, patch, patch, 3).transpose(0, 2, 1, 3, 4)
    canvas = canvas.reshape(res, res, 3)
    return example | {"image": canvas, "image_size": np.array(grid, np.int32)}

  return op


def naflex_grid(
  height: int, width: int, *, patch: int, most: int, tolerance: float = 1e-5
) -> tuple[int, int]:
  """(lines, columns) of the largest grid of an aspect ratio with `most` patches.

  By bisection of the scale, as the official code does.
  """
  low, high = tolerance / 10, 100.0

  def at(scale):
    return [max(1, math.ceil(x * scale / patch)) for x in (height, width)]

  while high - low >= tolerance:
    middle = (low + high) / 2
    lines, columns = at(middle)
    low, high = (middle, high) if lines * columns <= most else (low, middle)
  return tuple(at(low))


def center_crop(size: int) -> Op:
  """The middle square of this size; torchvision's CenterCrop."""
  _check_size(size)

  def op(example, rng):
    del rng
    image, width, height = _at_least(example, "center_crop", size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return example | {"image": image.crop((left, top, left + size, top + size))}

  return op


def random_crop(size: int) -> Op:
  """Any square of this size; torchvision's RandomCrop. CLIP's, after resize_shorter."""
  _check_size(size)

  def op(example, rng):
    image, width, height = _at_least(example, "random_crop", size)
    top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
    return example | {"image": image.crop((left, top, left + size, top + size))}

  return op


def _at_least(example, word, size):
  """(image, width, height) of one that a square of `size` fits into."""
  image = decode_lib.load(_opened(example, word))
  width, height = image.size
  if min(width, height) < size:
    raise ValueError(
      f"pp: {word}({size}): an image is {width}×{height}: put"
      f" resize_shorter({size}) before it."
    )
  return image, width, height


def random_resized_crop(
  size: int,
  min_area: float = 0.2,
  max_area: float = 1.0,
  min_ratio: float = 3 / 4,
  max_ratio: float = 4 / 3,
  by: Literal["pillow", "turbo"] = "pillow",
) -> Op:
  """A random window, resized to a square; torchvision's RandomResizedCrop.

  A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where the window stays larger than
  what is wanted.

  Args:
    size: side of the square.
    min_area, max_area: bounds of the window's share of the image. ALBEF pretrains with
      0.2 and fine-tunes with 0.5.
    min_ratio, max_ratio: bounds of its width over its height.
    by: "pillow", whose pixels are torchvision's, or "turbo", several times faster with
      the same windows (`data/turbo.py`; wants the packages of vlp-jax[fast]).
  """
  _check_size(size)
  if by == "turbo":
    turbo.packages()
  if not 0 < min_area <= max_area <= 1:
    raise ValueError(
      f"min_area={min_area}, max_area={max_area}: want 0 < min_area <= max_area <= 1."
    )
  if not 0 < min_ratio <= max_ratio:
    raise ValueError(
      f"min_ratio={min_ratio}, max_ratio={max_ratio}: want 0 < min_ratio <= max_ratio."
    )

  def opened(example):
    if by == "turbo" and isinstance(example["image"], decode_lib.File):
      return turbo.opened(example["image"].data)
    return _opened(example, "random_resized_crop")

  def op(example, rng):
    image = opened(example)
    top, left, height, width = random_window(
      *image.size[::-1], rng, area=(min_area, max_area), ratio=(min_ratio, max_ratio)
    )
    box = (left, top, left + width, top + height)
    if by == "turbo":
      return example | {"image": turbo.window(image, box, size)}
    image, box = decode_lib.load_window(image, box, (size, size))
    if box != (0, 0, *image.size):
      image = image.crop(box)
    return example | {"image": _resized(image, (size, size))}

  return op


def random_window(
  height: int,
  width: int,
  rng: np.random.Generator,
  *,
  area: tuple[float, float],
  ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
  """(top, left, height, width), by torchvision's rule.

  Uniform in area and in the logarithm of the aspect ratio; if no try fits into the
  image, the largest central window whose ratio is within bounds.
  """
  low, high = math.log(ratio[0]), math.log(ratio[1])
  for _ in range(TRIES):
    pixels = height * width * rng.uniform(*area)
    aspect = math.exp(rng.uniform(low, high))
    w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
    if 0 < w <= width and 0 < h <= height:
      top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
      return int(top), int(left), h, w
  w, h = width, height
  if width / height < ratio[0]:
    h = round(w / ratio[0])
  elif width / height > ratio[1]:
    w = round(h * ratio[1])
  return (height - h) // 2, (width - w) // 2, h, w


def flip(p: float = 0.5) -> Op:
  """Mirrors left and right with probability p."""
  if not 0 <= p <= 1:
    raise ValueError(f"p={p}: a probability, want 0 … 1.")

  def op(example, rng):
    image = pixels(_decoded(example, "flip"))
    # Drawn for every image, so that what follows draws the same.
    return example | {"image": turbo.mirrored(image) if rng.random() < p else image}

  return op


def randaugment(n: int = 2, m: float = 7) -> Op:
  """ALBEF's RandAugment: n of its ten ops, each applied with probability 0.5.

  Args:
    n: number of ops.
    m: strength, 0 … 10.
  """
  if n < 1:
    raise ValueError(f"n={n}: a number of ops, want 1 or more.")
  if not 0 <= m <= randaugment_lib.MAX_LEVEL:
    raise ValueError(f"m={m}: a strength, want 0 … {randaugment_lib.MAX_LEVEL}.")

  def op(example, rng):
    image = pixels(_decoded(example, "randaugment"))
    return example | {"image": randaugment_lib.augment(image, rng, count=n, level=m)}

  return op


def pixels(image: decode_lib.File | Image.Image | np.ndarray) -> np.ndarray:
  """uint8 [H, W, 3] of an image that is a file, opened, decoded or pixels already.

  Raises:
    BadRecordError: its file is damaged.
  """
  if isinstance(image, decode_lib.File):
    image = decode_lib.open_image(image.data)
  if isinstance(image, Image.Image):
    return np.asarray(decode_lib.load(image))
  return image


def _decoded(example, word):
  """The image as it is, Pillow's or pixels; a file is opened."""
  image = example["image"]
  if isinstance(image, bytes):
    raise ValueError(
      f"pp: {word}: the image is not decoded yet: put decode before {word}."
    )
  if isinstance(image, decode_lib.File):
    return decode_lib.open_image(image.data)
  return image


def _opened(example, word):
  """The image as Pillow's."""
  image = _decoded(example, word)
  if isinstance(image, Image.Image):
    return image
  return Image.fromarray(np.ascontiguousarray(image))


def _resized(image, size):
  return image.resize(size, Image.Resampling.BICUBIC)


def _check_size(size):
  if size < 1:
    raise ValueError(f"size={size}: want 1 or more.")


__all__ = ["BadRecordError", "Example", "Op"]
