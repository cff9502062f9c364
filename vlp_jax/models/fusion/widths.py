"""Widths of fusions in which words and patches are one sequence."""

import flax.linen as nn


def check_equal(fusion: nn.Module, what: str) -> None:
  """Checks that the towers of a fusion are equally wide.

  Args:
    fusion: has `image_width` and `text_width`. what: it is, for the message.

  Raises:
    ValueError: they are not.
  """
  image, text = fusion.image_width, fusion.text_width
  if image != text:
    raise ValueError(
      f"{what}: model.image.width={image} and model.text.width={text} must be equal."
    )
