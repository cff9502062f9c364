"""Muon: hidden matrices move by their orthogonalised momentum, all else by Adam.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon), as optax has it, at the
size of Adam's updates, so that one learning rate serves both (Liu et al. 2025,
https://arxiv.org/abs/2502.16982, equation 4).
"""

import math
import re
from typing import Any

import jax
import optax
from optax import contrib

from vlp_jax.ops import tree

MOMENTUM = 0.95  # Jordan's, with Nesterov's look ahead
RMS = 0.2  # of an update's elements, Liu et al. section 2.2
# What is orthogonalised, and which of its last axes are summed over and made. Axes
# before these (scanned layers) hold one matrix each. Embeddings and what reads the
# result out stay Adam's, as both papers say.
MATRICES = (
  (r"^model/.*/(attn|cross)\w*/(query|key|value)/kernel$", (-3,), (-2, -1)),
  (r"^model/.*/(attn|cross)\w*/out/kernel$", (-3, -2), (-1,)),
  (r"^model/.*/(up|down)/kernel$", (-2,), (-1,)),
  (r"^model/.*/stem/kernel_\d+$", (-4, -3, -2), (-1,)),
)


def scale_by_muon(adam: optax.GradientTransformation) -> optax.GradientTransformation:
  """Updates before the learning rate: Muon's where a path is in MATRICES, else Adam's.

  Raises:
    ValueError: the parameters have no such path; lists some that they have.
  """
  muon = contrib.scale_by_muon(beta=MOMENTUM, weight_dimension_numbers=_all_axes)
  sized = optax.stateless(lambda updates, _: tree.map_with_path(_resize, updates))
  parts = {"muon": optax.chain(muon, sized), "adam": adam}
  return optax.multi_transform(parts, _labels)


def _labels(params: Any) -> Any:
  labels = tree.map_with_path(lambda path, _: "muon" if axes(path) else "adam", params)
  if "muon" not in jax.tree.leaves(labels):
    raise ValueError(
      'config: optim.name="muon": no parameter is a hidden matrix of training/muon.py'
      f" MATRICES; there are {', '.join(list(tree.flatten(params))[:3])}, …"
    )
  return labels


def _all_axes(params):
  return tree.map_with_path(lambda path, _: axes(path), params)


def _resize(path, update):
  """An orthogonal matrix [I, O] has elements of 1 / sqrt(max(I, O))."""
  summed, made = (math.prod(update.shape[i] for i in part) for part in axes(path))
  return update * (RMS * math.sqrt(max(summed, made)))


def axes(path: str) -> contrib.MuonDimensionNumbers | None:
  """Which axes of the parameter at this path are summed over and made; None: Adam's."""
  for pattern, summed, made in MATRICES:
    if re.search(pattern, path):
      return contrib.MuonDimensionNumbers(summed, made)
  return None
