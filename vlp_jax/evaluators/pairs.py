"""Encodes images and texts once, and fuses any pairs of them.

Shape letters: I images, T texts, N pairs of one step, E embedding.
"""

from collections.abc import Callable, Iterable
import dataclasses
from typing import Any

import jax
import numpy as np

from vlp_jax.evaluators import placement


@dataclasses.dataclass(frozen=True)
class Encoder:
  """Runs one tower over a data set.

  Attributes:
    encode: compiled (variables, *arrays of `keys`) -> (z [B, E], tokens or None).
    place: where.
    keys: of a batch, what the tower wants.
    columns: of a batch, what to keep beside.
  """

  encode: Callable
  place: placement.Placement
  keys: tuple[str, ...]
  columns: tuple[str, ...]

  def __call__(self, variables: Any, batches: Iterable[dict]) -> dict[str, Any]:
    """Host arrays of the valid rows: "z" float32 [n, E], None where there is no such
    space, "tokens", and the columns."""
    args = ((b, self.place.split(tuple(b[k] for k in self.keys))) for b in batches)
    parts = []
    for batch, (z, tokens) in self.place.run(self.encode, variables, args):
      row = {k: np.asarray(batch[k]) for k in self.columns}
      z = None if z is None else np.asarray(z, np.float32)
      row |= {"z": z, "tokens": tokens}
      parts.append(placement.take(row, np.flatnonzero(batch["valid"])))
    if not parts:
      raise ValueError("evals: the data source has no examples.")
    return placement.join(parts)


def image_encoder(
  pretrainer: Any,
  place: placement.Placement,
  *,
  columns: tuple[str, ...] = (),
  tokens: bool = True,
  sized: bool = False,
) -> Encoder:
  """Encoder of images; `tokens` says whether what fusion needs is kept on the host.

  sized: the batches have the "image_size" of images that are padded.
  """

  def encode(variables, image, *size):
    def call(m, image, *size):
      out = m.model.encode_image(image, *size)
      return m.model.embed_image(out), out if tokens else None

    return pretrainer.apply(variables, image, *size, method=call)

  keys = ("image", "image_size") if sized else ("image",)
  return Encoder(place.jit(encode), place, keys, columns)


def text_encoder(
  pretrainer: Any,
  place: placement.Placement,
  *,
  columns: tuple[str, ...] = (),
  tokens: bool = True,
) -> Encoder:
  """Encoder of texts."""

  def encode(variables, ids, mask):
    def call(m, ids, mask):
      out = m.model.encode_text(ids, mask)
      words = m.model.words(ids, mask, out) if tokens else None
      return m.model.embed_text(out), words

    return pretrainer.apply(variables, ids, mask, method=call)

  return Encoder(place.jit(encode), place, ("text", "text_mask"), columns)


@dataclasses.dataclass(frozen=True)
class Fuser:
  """Applies a function to pairs of an image and something else, in steps of one shape.

  The image's tokens, by far the largest, travel once for all its pairs of a step.

  Attributes:
    fuse: compiled (variables, image Tokens [U, S, D], row int32 [N], texts) -> [N, …].
    place: where.
    step: N.
  """

  fuse: Callable
  place: placement.Placement
  step: int

  def __call__(
    self,
    variables: Any,
    images: Any,
    texts: Any,
    image_row: np.ndarray,
    text_row: np.ndarray,
    *,
    per_image: int,
  ) -> np.ndarray:
    """The function's value for each pair, [pairs, …].

    Args:
      variables: of the pretrainer.
      images, texts: host trees of I and of T rows.
      image_row, text_row: int [pairs], sorted by image.
      per_image: each image has at least so many pairs.
    """
    # A run of `step` pairs touches at most so many images: all but the first and the
    # last have all their pairs within it.
    most = max(self.step - 2, 0) // per_image + 2

    def steps():
      for start in range(0, len(image_row), self.step):
        part = slice(start, start + self.step)
        unique, inverse = np.unique(image_row[part], return_inverse=True)
        few = placement.pad(placement.take(images, unique), most)
        pairs = (inverse.astype(np.int32), placement.take(texts, text_row[part]))
        inverse, words = self.place.split(placement.pad(pairs, self.step))
        yield None, (self.place.copy(few), inverse, words)

    out = [x for _, x in self.place.run(self.fuse, variables, steps())]
    return np.concatenate(out)[: len(image_row)]


def fuser(
  pretrainer: Any, place: placement.Placement, call: Callable, *, step: int
) -> Fuser:
  """A Fuser of `call(bound pretrainer, image Tokens [N, …], texts) -> [N, …]`.

  `step` is rounded up to what the mesh can split.
  """

  def fuse(variables, images, row, texts):
    images = jax.tree.map(lambda x: x[row], images)
    return pretrainer.apply(variables, images, texts, method=call)

  step = -(-step // place.parts) * place.parts
  return Fuser(place.jit(fuse), place, step)


def check(
  name: str, pairs: int, objective: str | None, pretrainer: Any, method: str
) -> None:
  """Raises ValueError if no objective of that name has the method, or no pair is in a
  step."""
  if pairs < 1:
    raise ValueError(f"evals ({name}): pairs={pairs}: want 1 or more.")
  if objective is not None and objective not in pretrainer.objectives:
    raise ValueError(
      f'evals ({name}): objective="{objective}" is not among the objectives of the'
      f" config, {sorted(pretrainer.objectives)}: name one of those, or leave this"
      " evaluation out."
    )
  if objective is None:
    return
  if not callable(getattr(pretrainer.objectives[objective], method, None)):
    raise ValueError(
      f'evals ({name}): objective="{objective}" is of another kind, without {method}:'
      f" name one of {sorted(pretrainer.objectives)} that has it, or leave this"
      " evaluation out."
    )
