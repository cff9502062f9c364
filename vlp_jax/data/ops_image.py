"""Words of the pp string that work on images; see example.py for what they get.

Geometry is torchvision's and resampling is Pillow's, as in the official code of ALBEF
(dataset/__init__.py), BLIP and CLIP: pixels are the same to the last bit.
"""

from collections.abc import Callable
import math

import numpy as np
import tensorflow as tf

from vlp_jax.data import decode as decode_lib
from vlp_jax.data import example as example_lib
from vlp_jax.data.example import Example, Op

# These decode for themselves, and only what they need: `decode` before them says where
# pixels begin, and does nothing.
DECODING = ("center_crop", "random_resized_crop", "resize", "resize_shorter")
TRIES = 10  # torchvision.transforms.RandomResizedCrop.get_params


def decode() -> Op:
  """File -> uint8 [H, W, 3], the first picture of an animation, greys and CMYK as RGB."""

  def op(example: Example) -> Example:
    if "image" not in example:
      return example
    if example["image"].dtype != tf.string:
      raise ValueError("pp: decode: the image is decoded already: say decode once.")
    return _with_image(example, _whole, size=(None, None))

  return op


def resize(size: int) -> Op:
  """To a square, its aspect ratio lost: the official evaluation of ALBEF and BLIP."""
  _check_size(size)

  def cut(image):
    # No JPEG scaling here: the official transform decodes the whole image.
    image = decode_lib.load(image)
    window = (0, 0, image.height, image.width)
    return decode_lib.crop_and_resize(image, window, (size, size))

  return _sized(cut, (size, size))


def resize_shorter(size: int) -> Op:
  """The shorter side to `size`, the aspect ratio kept; torchvision's Resize(int)."""
  _check_size(size)
  return _sized(lambda image: _shorter(image, size), (None, None))


def center_crop(size: int) -> Op:
  """The middle square of this size; torchvision's CenterCrop.

  Raises:
    ValueError: when run, on an image that is smaller.
  """
  _check_size(size)

  def cut(image):
    image = decode_lib.load(image)
    if min(image.size) < size:
      raise ValueError(
        f"pp: center_crop({size}): an image is {image.width}×{image.height}: put"
        f" resize_shorter({size}) before it."
      )
    top, left = (round((side - size) / 2) for side in image.size[::-1])
    return np.asarray(image.crop((left, top, left + size, top + size)))

  return _sized(cut, (size, size))


def random_resized_crop(
  size: int,
  min_area: float = 0.2,
  max_area: float = 1.0,
  min_ratio: float = 3 / 4,
  max_ratio: float = 4 / 3,
) -> Op:
  """A random window, resized to a square; torchvision's RandomResizedCrop.

  A JPEG much larger than `size` is decoded at a reduced scale.

  Args:
    size: side of the square.
    min_area, max_area: bounds of the window's share of the image. ALBEF pretrains with
      0.2 and fine-tunes with 0.5.
    min_ratio, max_ratio: bounds of its width over its height.
  """
  _check_size(size)
  if not 0 < min_area <= max_area <= 1:
    raise ValueError(
      f"min_area={min_area}, max_area={max_area}: want 0 < min_area <= max_area <= 1."
    )
  if not 0 < min_ratio <= max_ratio:
    raise ValueError(
      f"min_ratio={min_ratio}, max_ratio={max_ratio}: want 0 < min_ratio <= max_ratio."
    )
  bounds = dict(area=(min_area, max_area), ratio=(min_ratio, max_ratio))

  def cut(image, uniforms):
    window = random_window(image.height, image.width, uniforms, **bounds)
    return decode_lib.crop_and_resize(image, window, (size, size))

  def draw(example):
    seed = example_lib.stream(example, "random_resized_crop")
    return tf.random.stateless_uniform([TRIES, 4], seed, dtype=tf.float32)

  return _sized(cut, (size, size), draw)


def random_window(
  height: int,
  width: int,
  uniforms: np.ndarray,
  *,
  area: tuple[float, float],
  ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
  """(top, left, height, width), by torchvision's rule from uniform numbers [tries, 4].

  Uniform in area and in the logarithm of the aspect ratio; if no try fits into the
  image, the largest central window whose ratio is within bounds.
  """
  low, high = math.log(ratio[0]), math.log(ratio[1])
  for u_area, u_ratio, u_top, u_left in np.asarray(uniforms, np.float64):
    pixels = height * width * (area[0] + u_area * (area[1] - area[0]))
    aspect = math.exp(low + u_ratio * (high - low))
    w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
    if 0 < w <= width and 0 < h <= height:
      return int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w
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

  def op(example: Example) -> Example:
    if "image" not in example:
      return example
    image = example_lib.pixels(example, "flip")
    draw = tf.random.stateless_uniform([], example_lib.stream(example, "flip"))
    image = tf.cond(draw < p, lambda: image[:, ::-1], lambda: tf.identity(image))
    return example | {"image": image}

  return op


# --- How an image goes through Pillow -------------------------------------------------


def _whole(image):
  return np.asarray(decode_lib.load(image))


def _shorter(image, size):
  width, height = image.size
  if width <= height:
    new = (int(size * height / width), size)
  else:
    new = (size, int(size * width / height))
  image = decode_lib.load(image)
  return decode_lib.crop_and_resize(image, (0, 0, height, width), new)


def _sized(cut, size, draw=None):
  """The op of `cut`, a function of an opened image and the numbers of `draw`."""

  def op(example: Example) -> Example:
    if "image" not in example:
      return example
    return _with_image(example, cut, size=size, draw=draw)

  return op


def _with_image(
  example: Example,
  cut: Callable,
  *,
  size: tuple[int | None, int | None],
  draw: Callable | None = None,
) -> Example:
  """The example with its image, a file or pixels, sent through `cut`."""
  # A broken record's place in the batch; also when several words follow each other.
  blank = np.zeros([side or 1 for side in size] + [3], np.uint8)

  def run(image, bad, *numbers):
    if bad:
      return blank, bad
    try:
      encoded = isinstance(image, bytes)
      opened = (
        decode_lib.open_image(image) if encoded else decode_lib.Image.fromarray(image)
      )
      return np.ascontiguousarray(cut(opened, *numbers)), b""
    except decode_lib.BrokenImageError as error:
      return blank, str(error).encode()

  bad = tf.convert_to_tensor(example.get("bad", ""))
  numbers = [draw(example)] if draw else []
  # Stateless: the same bytes and numbers give the same pixels.
  image, bad = tf.numpy_function(
    run, [example["image"], bad, *numbers], [tf.uint8, tf.string], stateful=False
  )
  image.set_shape([*size, 3])
  bad.set_shape([])
  return example | {"image": image, "bad": bad}


def _check_size(size):
  if size < 1:
    raise ValueError(f"size={size}: want 1 or more.")
