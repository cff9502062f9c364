"""Regions of a detector, made into what models read of where they lie.

Shape letters: R regions, C classes.
"""

import numpy as np

EPS = 1e-5


def places(boxes: np.ndarray, classes: np.ndarray) -> np.ndarray:
  """float32 [R, 6 + C] of one image: box, area and confidence, then classes.

  VLP's (official vlp/seq2seq_loader.py Preprocess4Seq2seq): coordinates as parts of the
  largest ones that the image has, and both parts normed as by a layer norm.

  Args:
    boxes: float [R, 6], x1, y1, x2, y2, a number that is not read, confidence.
    classes: float [R, C], probabilities.

  Raises:
    ValueError: other shapes, or boxes without extent.
  """
  boxes = np.array(boxes, np.float32)
  classes = np.asarray(classes, np.float32)
  if boxes.ndim != 2 or boxes.shape[1] != 6 or len(classes) != len(boxes):
    raise ValueError(
      f"regions: boxes {list(boxes.shape)} and classes {list(classes.shape)}: want"
      " [R, 6] and [R, C]."
    )
  largest = [boxes[:, side::2][:, :2].max() + np.float32(EPS) for side in (0, 1)]
  if min(largest) <= 0:
    raise ValueError("regions: the boxes of an image have no extent.")
  boxes[:, [0, 2]] /= largest[0]
  boxes[:, [1, 3]] /= largest[1]
  area = (boxes[:, 3] - boxes[:, 1]) * (boxes[:, 2] - boxes[:, 0])
  boxes[:, 4] = np.maximum(area, 0.0)
  return np.concatenate([_normed(boxes), _normed(classes)], axis=1)


def _normed(x):
  """A layer norm without parameters over the last axis, as torch's."""
  centred = x - x.mean(axis=-1, keepdims=True)
  variance = (centred**2).mean(axis=-1, keepdims=True)
  return centred / np.sqrt(variance + EPS)
