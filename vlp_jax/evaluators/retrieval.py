"""Zero-shot image-text retrieval, by ITC alone and re-ranked by ITM; or by all pairs.

ALBEF's Retrieval.py, `evaluation` and `itm_eval`
(https://github.com/salesforce/ALBEF, section 4 of arXiv:2107.07651). Where there is no
contrastive space, every image is fused with every text: ViLT's and METER's
modules/objectives.py `compute_irtr_recall`.

Shape letters: I images, T texts, K candidates.
"""

import dataclasses
from typing import Any, Literal

import jax
import numpy as np

from vlp_jax.data import evaluation
from vlp_jax.data import pp as pp_lib
from vlp_jax.evaluators import pairs
from vlp_jax.evaluators import placement
from vlp_jax.ops import metrics

# Score of what was not re-ranked, in the official code.
NOT_RANKED = -100.0
# Of all pairs, so many are laid out at once.
BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Result:
  """What the last evaluation saw, for the report.

  Attributes:
    similarity: float32 [I, T], of ITC; None where all pairs are fused.
    score_i2t, score_t2i: float32 [I, T] and [T, I], what the final ranking is made of:
      ITM where it re-ranked or scored all, otherwise the similarity.
    text_to_image: int [T], a row of the images.
    captions: T strings. image_id, example_index: int [I].
  """

  similarity: np.ndarray | None
  score_i2t: np.ndarray
  score_t2i: np.ndarray
  text_to_image: np.ndarray
  captions: tuple[str, ...]
  image_id: np.ndarray
  example_index: np.ndarray


@dataclasses.dataclass
class Evaluator:
  """Recall at k of all captions among all images, and the other way.

  Examples that share an image id are one image with all their captions; an image
  without a caption, and a caption without an image, are left out.

  Attributes:
    rerank: K, how many candidates of each query ITM scores anew; 0: ITC alone. Below
      10 candidates, R@10 counts ties.
    all_pairs: the objective scores each image with each text, for models without a
      contrastive space. It takes images times texts passes of the fusion: ViLT's
      EVAL.md says 35 hours of 8 GPUs for COCO.
    objective: the name of the objective in the config that scores a pair: of
      objectives/itm.py, or text_rank.py, as ViLT's is after fine-tuning.
    add_similarity: what joins the ITM logit: "no" similarity (ALBEF); the similarity
      "as_is" (BLIP); or "scaled" by the temperature. Against negatives that are drawn
      by ITC's softmax, ITM learns by how much that is wrong (noise-contrastive
      estimation, Gutmann and Hyvarinen 2010), and the sum is the whole log-odds.
    pairs: how many are fused in one step; bounds memory.
  """

  rerank: int = 0
  all_pairs: bool = False
  objective: str = "itm"
  add_similarity: Literal["no", "as_is", "scaled"] = "no"
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
    if self.rerank < 0:
      raise ValueError(f"evals (retrieval): rerank={self.rerank}: want 0 or more.")
    scores = bool(self.rerank) or self.all_pairs
    wanted = self.objective if scores else None
    pairs.check("retrieval", self.pairs, wanted, pretrainer, "score")
    self._check_space(pretrainer)
    self.last = None
    sized = pp_lib.leaves_sizes(pp)
    self._images = lambda: evaluation.eval_images(
      source, pp, batch_size=batch_size, sizes=sized
    )
    self._texts = lambda: evaluation.eval_texts(
      source, pp, tokenizer, batch_size=batch_size
    )
    # Tokens leave the device only for those who fuse them.
    self._encode_images = pairs.image_encoder(
      pretrainer,
      place,
      columns=("image_id", "example_index"),
      tokens=scores,
      sized=sized,
    )
    self._encode_texts = pairs.text_encoder(
      pretrainer, place, columns=("image_id", "caption"), tokens=scores
    )

    def score(m, images, texts):
      return m.objectives[self.objective].score(m.model, images, texts)

    self._score = pairs.fuser(pretrainer, place, score, step=self.pairs)
    self._inverse_temperature = lambda variables: pretrainer.apply(
      variables, method=lambda m: m.model.inverse_temperature()
    )

  def __call__(self, variables: Any) -> dict[str, float]:
    """Percentages "itc/i2t_r1" … "itc/mean", "itm/…" where re-ranked, or "all/…" of all
    pairs alone, and "chance/…"."""
    images = self._encode_images(variables, self._images())
    texts = self._encode_texts(variables, self._texts())
    image_row, text_row, owner = match(images["image_id"], texts["image_id"])
    images, texts = placement.take(images, image_row), placement.take(texts, text_row)
    if self.all_pairs:
      similarity, name = None, "all"
      i2t = self._score_all(variables, images["tokens"], texts["tokens"])
      t2i = i2t.T
    else:
      similarity, name = images["z"] @ texts["z"].T, "itc"
      i2t, t2i = similarity, similarity.T
    out = _named(name, metrics.retrieval_recall(i2t, t2i, owner))
    if self.rerank:
      i2t, t2i = self._rerank(variables, similarity, images["tokens"], texts["tokens"])
      out |= _named("itm", metrics.retrieval_recall(i2t, t2i, owner))
    out |= _named("chance", metrics.chance_recall(owner, len(image_row)))
    self.last = Result(
      similarity=similarity,
      score_i2t=i2t,
      score_t2i=t2i,
      text_to_image=owner,
      captions=tuple(str(c) for c in texts["caption"]),
      image_id=images["image_id"],
      example_index=images["example_index"],
    )
    return out

  def _check_space(self, pretrainer):
    """That what is asked for is what the model has."""
    if self.all_pairs and self.rerank:
      raise ValueError(
        f"evals (retrieval): all_pairs=True leaves nothing to rerank={self.rerank}: say"
        " one of them."
      )
    if not self.all_pairs and pretrainer.model.embed_dim is None:
      raise ValueError(
        "evals (retrieval): the model has no contrastive space (model.embed_dim=None):"
        " say all_pairs=True, which fuses every image with every text, or leave this"
        " evaluation out."
      )

  def _score_all(self, variables, images, texts):
    """float32 [I, T] of every pair, by blocks of images."""
    count, words = len(jax.tree.leaves(images)[0]), len(jax.tree.leaves(texts)[0])
    rows = max(1, BLOCK // words)
    parts = []
    for start in range(0, count, rows):
      some = np.arange(start, min(start + rows, count))
      scores = self._score(
        variables,
        images,
        texts,
        np.repeat(some, words),
        np.tile(np.arange(words), len(some)),
        per_image=words,
      )
      parts.append(scores.reshape(len(some), words))
    return np.concatenate(parts).astype(np.float32)

  def _rerank(self, variables, similarity, images, texts):
    """(score_i2t [I, T], score_t2i [T, I]): ITM of each query's first K, -100 else."""
    k_texts = min(self.rerank, similarity.shape[1])
    k_images = min(self.rerank, similarity.shape[0])
    i2t = np.zeros(similarity.shape, bool)
    t2i = np.zeros(similarity.T.shape, bool)
    np.put_along_axis(i2t, metrics.ranking(similarity, k_texts), True, axis=1)
    np.put_along_axis(t2i, metrics.ranking(similarity.T, k_images), True, axis=1)
    # A pair that both directions want is scored once.
    image_row, text_row = np.nonzero(i2t | t2i.T)
    scored = np.full(similarity.shape, NOT_RANKED, np.float32)
    scored[image_row, text_row] = self._score(
      variables, images, texts, image_row, text_row, per_image=k_texts
    )
    added = similarity[image_row, text_row]
    if self.add_similarity == "scaled":
      # One more, that all who are ranked stay above those who are not.
      added = (added + 1) * float(self._inverse_temperature(variables))
    if self.add_similarity != "no":
      scored[image_row, text_row] += added
    return np.where(i2t, scored, NOT_RANKED), np.where(t2i, scored.T, NOT_RANKED)


def match(
  image_ids: np.ndarray, text_image_ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Which rows take part, and which image each text belongs to.

  Returns:
    image rows int [I], the first of each id that some text has; text rows int [T],
    those whose image there is; int [T], each text's place among the I images.
  """
  shared = np.isin(image_ids, text_image_ids)
  if not shared.any():
    raise ValueError("evals (retrieval): no image of the data source has a caption.")
  unique, first = np.unique(image_ids, return_index=True)
  image_row = np.sort(first[np.isin(unique, image_ids[shared])])
  text_row = np.flatnonzero(np.isin(text_image_ids, image_ids[image_row]))
  place = {int(image): i for i, image in enumerate(image_ids[image_row])}
  owner = np.array([place[int(image)] for image in text_image_ids[text_row]])
  return image_row, text_row, owner


def _named(prefix, values):
  kept = {k: v for k, v in values.items() if k == "mean" or "_r" in k}
  return {f"{prefix}/{name}": value for name, value in kept.items()}
