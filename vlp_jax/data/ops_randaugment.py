"""RandAugment (Cubuk et al. 2019, arXiv:1909.13719) with the list of ops of ALBEF.

The meaning is that of https://github.com/salesforce/ALBEF dataset/randaugment.py, where
two of its functions do not do what they say they do, and ours do what Pillow does:
AutoContrast there makes a channel white whose darkest value is above 0 (it negates a
uint8), and Sharpness lets values below 0 and above 255 wrap around.
"""

from collections.abc import Callable

import tensorflow as tf

from vlp_jax.data import example as example_lib
from vlp_jax.data.example import Example, Op

MAX_LEVEL = 10
FILL = 128.0  # what geometric ops bring in from outside the image
SKIP = 0.5  # probability that a drawn op is not applied
SHEAR = 0.3  # at MAX_LEVEL; a share of the side
TRANSLATE = 10.0  # pixels, whatever the image's size
ROTATE = 30.0  # degrees


def randaugment(n: int = 2, m: float = 7) -> Op:
  """Applies n ops of ALBEF's list, drawn with repetition, each with probability 0.5.

  Args:
    n: number of ops.
    m: strength, 0 … 10.
  """
  if n < 1:
    raise ValueError(f"n={n}: a number of ops, want 1 or more.")
  if not 0 <= m <= MAX_LEVEL:
    raise ValueError(f"m={m}: a strength, want 0 … {MAX_LEVEL}.")

  def op(example: Example) -> Example:
    if "image" not in example:
      return example
    image = example_lib.pixels(example, "randaugment")
    seed = example_lib.stream(example, "randaugment")
    draws = tf.random.stateless_uniform([n, 3], seed)
    shape = image.shape
    for i in range(n):
      choice = tf.cast(draws[i, 0] * len(OPS), tf.int32)
      sign = tf.where(draws[i, 1] < 0.5, -1.0, 1.0)
      # One more branch: the op is skipped.
      choice = tf.where(draws[i, 2] < SKIP, len(OPS), choice)
      image = tf.switch_case(choice, _branches(image, m / MAX_LEVEL, sign))
      image.set_shape(shape)
    return example | {"image": image}

  return op


def _branches(image, level, sign) -> list[Callable]:
  branches = [lambda f=f: f(image, level, sign) for f in OPS.values()]
  return [*branches, lambda: tf.identity(image)]


# --- The ops: uint8 [H, W, 3], level 0 … 1, sign -1.0 or 1.0 -> uint8 [H, W, 3] ---------


def identity(image, level, sign):
  """Nothing."""
  return tf.identity(image)


def autocontrast(image, level, sign):
  """Stretches each channel to 0 … 255."""
  low = tf.cast(tf.reduce_min(image, axis=[0, 1]), tf.float64)[:, None]
  high = tf.cast(tf.reduce_max(image, axis=[0, 1]), tf.float64)[:, None]
  scale = 255.0 / tf.maximum(high - low, 1.0)
  values = tf.range(256, dtype=tf.float64)[None, :]
  table = tf.where(high > low, values * scale - low * scale, values)
  return _look_up(image, table)


def equalize(image, level, sign):
  """Equalizes the histogram of each channel, by Pillow's rule."""
  channels = tf.reshape(tf.cast(image, tf.int32), [-1, 3])
  # One count for three channels: the second's values start at 256, the third's at 512.
  counts = tf.math.bincount(
    tf.reshape(channels + [0, 256, 512], [-1]), minlength=768, maxlength=768
  )
  counts = tf.reshape(counts, [3, 256])
  total = tf.reduce_sum(counts, axis=1, keepdims=True)
  # Of the brightest value that there is.
  last = tf.reduce_max(tf.cast(channels, tf.int32), axis=0)[:, None]
  step = (total - tf.gather(counts, last, batch_dims=1)) // 255
  before = tf.cumsum(counts, axis=1, exclusive=True)
  table = (before + step // 2) // tf.maximum(step, 1)
  table = tf.where(step > 0, table, tf.range(256)[None, :])
  return _look_up(image, tf.cast(table, tf.float64))


def brightness(image, level, sign):
  """Scales by 0.1 … 1.9."""
  values = tf.range(256, dtype=tf.float32)[None, :] * _factor(level)
  return _look_up(image, tf.repeat(values, 3, axis=0))


def sharpness(image, level, sign):
  """Blends with a smoothed image, by 0.1 … 1.9; the outermost pixels stay."""
  kernel = tf.constant([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13.0
  exact = tf.cast(image, tf.float32)
  smooth = tf.nn.depthwise_conv2d(
    exact[None], tf.tile(kernel[:, :, None, None], [1, 1, 3, 1]), [1] * 4, "VALID"
  )[0]
  smooth = tf.round(smooth)
  inner = smooth + _factor(level) * (exact[1:-1, 1:-1] - smooth)
  inner = tf.cast(tf.clip_by_value(inner, 0.0, 255.0), tf.uint8)
  # An image of one or two pixels has no inside.
  height, width = tf.shape(image)[0], tf.shape(image)[1]
  inside = tf.pad(tf.ones_like(inner, tf.bool), [[1, 1], [1, 1], [0, 0]])
  blended = tf.where(inside, tf.pad(inner, [[1, 1], [1, 1], [0, 0]]), image)
  return tf.reshape(blended, [height, width, 3])


def shear_x(image, level, sign):
  """Row y moves right by a share of y."""
  return _affine(image, [1.0, -sign * level * SHEAR, 0.0, 0.0, 1.0, 0.0])


def shear_y(image, level, sign):
  """Column x moves down by a share of x."""
  return _affine(image, [1.0, 0.0, 0.0, -sign * level * SHEAR, 1.0, 0.0])


def translate_x(image, level, sign):
  """Moves left or right."""
  return _affine(image, [1.0, 0.0, sign * level * TRANSLATE, 0.0, 1.0, 0.0])


def translate_y(image, level, sign):
  """Moves up or down."""
  return _affine(image, [1.0, 0.0, 0.0, 0.0, 1.0, sign * level * TRANSLATE])


def rotate(image, level, sign):
  """Turns about the middle, counter-clockwise where sign is positive."""
  angle = sign * level * ROTATE * (3.141592653589793 / 180.0)
  cos, sin = tf.cos(angle), tf.sin(angle)
  # cv2.getRotationMatrix2D about (W / 2, H / 2), inverted.
  x = tf.cast(tf.shape(image)[1], tf.float32) / 2.0
  y = tf.cast(tf.shape(image)[0], tf.float32) / 2.0
  return _affine(
    image, [cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y]
  )


# In the order of the official list.
OPS = {
  "Identity": identity,
  "AutoContrast": autocontrast,
  "Equalize": equalize,
  "Brightness": brightness,
  "Sharpness": sharpness,
  "ShearX": shear_x,
  "ShearY": shear_y,
  "TranslateX": translate_x,
  "TranslateY": translate_y,
  "Rotate": rotate,
}


def _factor(level):
  return 0.1 + 1.8 * level


def _look_up(image, table):
  """Replaces values by those of a table [3, 256], cut off to whole numbers."""
  table = tf.cast(tf.clip_by_value(table, 0, 255), tf.uint8)
  # Channel c of the table starts at 256 c.
  index = tf.cast(image, tf.int32) + [0, 256, 512]
  return tf.gather(tf.reshape(table, [-1]), index)


def _affine(image, row):
  """Output (x, y) is input (a x + b y + c, d x + e y + f), bilinear."""
  transform = tf.stack([tf.cast(v, tf.float32) for v in row] + [0.0, 0.0])
  out = tf.raw_ops.ImageProjectiveTransformV3(
    images=tf.cast(image, tf.float32)[None],
    transforms=transform[None],
    output_shape=tf.shape(image)[:2],
    fill_value=FILL,
    interpolation="BILINEAR",
    fill_mode="CONSTANT",
  )[0]
  return tf.cast(tf.round(out), tf.uint8)
