"""Does the ITM head tell a caption from another image's?"""

import dataclasses
from typing import Any

import jax
import numpy as np

from vlp_jax.data import evaluation
from vlp_jax.evaluators import pairs
from vlp_jax.evaluators import placement


@dataclasses.dataclass
class Evaluator:
  """Accuracy of ITM on each example's own pair and on two wrong ones.

  The wrong captions are another image's: one at random, one the most similar by ITC.
  Of an example with several captions, the first counts.

  Attributes:
    objective: the name of the ITM objective in the config.
    seed: of the random captions.
    pairs: how many are fused in one step; bounds memory.
  """

  objective: str = "itm"
  seed: int = 0
  pairs: int = 256

  def setup(
    self,
    *,
    pretrainer: Any,
    source: Any,
    tokenizer: Any,
    pp: str,
    mesh: jax.sharding.Mesh | None,
    batch_size: int,
  ) -> None:
    """Binds model and data, and makes the functions that are compiled once."""
    place = placement.of(mesh, batch_size)
    pairs.check("itm", self.pairs, self.objective, pretrainer, "logits")
    if pretrainer.model.embed_dim is None:
      raise ValueError(
        "evals (itm): the most similar wrong caption is found in a contrastive space,"
        " which the model lacks (model.embed_dim=None): leave this evaluation out."
      )

    def batches():
      return evaluation.eval_pairs(source, pp, tokenizer, batch_size=batch_size)

    self._batches = batches
    self._batch_size = batch_size
    columns = ("image_id", "text", "text_mask")
    self._encode_images = pairs.image_encoder(pretrainer, place, columns=columns)
    self._encode_texts = pairs.text_encoder(pretrainer, place)

    def matches(m, images, texts):
      logits = m.objectives[self.objective].logits(m.model, images, texts)
      return logits[:, 1] > logits[:, 0]

    self._matches = pairs.fuser(pretrainer, place, matches, step=self.pairs)

  def __call__(self, variables: Any) -> dict[str, float]:
    """Percentages: "accuracy" over true and random pairs, "accuracy_hard" over true and
    hard ones; and of each kind alone, "true", "random", "hard"."""
    images = self._encode_images(variables, self._batches())
    # Without reading the images again.
    columns = {key: images[key] for key in ("text", "text_mask")}
    texts = self._encode_texts(variables, placement.batches(columns, self._batch_size))
    ids = images["image_id"]
    count = len(ids)
    own = np.arange(count)
    other = mismatch(ids, self.seed)
    similarity = images["z"] @ texts["z"].T
    hard = np.argmax(np.where(ids[:, None] == ids, -np.inf, similarity), axis=1)
    said = self._matches(
      variables,
      images["tokens"],
      texts["tokens"],
      np.repeat(own, 3),
      np.stack([own, other, hard], axis=1).reshape(-1),
      per_image=3,
    ).reshape(count, 3)
    right = 100.0 * np.mean(said == np.array([True, False, False]), axis=0)
    true, random, hard = (float(x) for x in right)
    return {
      "accuracy": (true + random) / 2,
      "accuracy_hard": (true + hard) / 2,
      "true": true,
      "random": random,
      "hard": hard,
    }


def mismatch(image_ids: np.ndarray, seed: int) -> np.ndarray:
  """int [n]: for each row another row, each taken once, never one of the same image."""
  count = len(image_ids)
  _, group, sizes = np.unique(image_ids, return_inverse=True, return_counts=True)
  largest = int(sizes.max())
  if 2 * largest > count:
    raise ValueError(
      f"evals (itm): {largest} of {count} examples are of one image, so some have no"
      " caption of another image: use more images."
    )
  rng = np.random.default_rng(seed)
  # Rows in random order, but those of one image side by side: so many places on, every
  # row is another image's.
  order = np.lexsort((rng.permutation(count), rng.permutation(len(sizes))[group]))
  out = np.empty(count, int)
  out[order] = np.roll(order, -largest)
  return out
