"""What preprocessing works on: one example as a dict of tensors.

  image: string [], an encoded file, until it is decoded; then uint8 [H, W, 3].
  caption: string [] (or [n], several captions), UTF-8.
  seed: int64 [2], (seed of the run, position of the example in it).
  bad: string [], why the record cannot be used; "" where it can.

Other keys pass through. An op whose key is not there (captions alone are cleaned, images
alone are resized) leaves the example as it is.
"""

from collections.abc import Callable
import zlib

import tensorflow as tf

Example = dict[str, tf.Tensor]
# A function whose annotation says that it returns an Op is a word of the pp string.
Op = Callable[[Example], Example]


def stream(example: Example, name: str) -> tf.Tensor:
  """int64 [2]: the seed of one op, bound to its name and not to its place in the chain.

  So another op before it changes nothing that it draws.
  """
  return tf.random.experimental.stateless_fold_in(
    example["seed"], tf.constant(zlib.crc32(name.encode()), tf.int64)
  )


def pixels(example: Example, word: str) -> tf.Tensor:
  """The decoded image.

  Raises:
    ValueError: it is still a file.
  """
  image = example["image"]
  if image.dtype == tf.string:
    raise ValueError(
      f"pp: {word} wants pixels, but the image is not decoded yet: put decode or"
      f" random_resized_crop(…) before {word}."
    )
  return image
