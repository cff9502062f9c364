"""Retrieval metrics, on the host.

Shape letters: I images, T texts.
"""

from collections.abc import Sequence

import numpy as np


def retrieval_recall(
  score_i2t: np.ndarray,
  score_t2i: np.ndarray,
  text_to_image: np.ndarray,
  ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
  """Recall at k in percent, both ways: ALBEF's Retrieval.py, `itm_eval`.

  An image counts at k if any of its texts is among the first k. Equal scores rank by
  index, the larger first: what the official `argsort(score)[::-1]` gives where the sort
  is stable.

  Args:
    score_i2t: float [I, T], each row the scores of one image's candidates.
    score_t2i: float [T, I], each row those of one text; not always the transpose, as
      candidates that were not re-ranked may differ.
    text_to_image: int [T], the row of the image that each text belongs to.
    ks: cut-offs.

  Returns:
    "i2t_r1" …, "t2i_r1" …, the means over `ks` "i2t_mean", "t2i_mean", and "mean".

  Raises:
    ValueError: shapes disagree, a score is NaN, or an image has no text.
  """
  score_i2t, score_t2i = np.asarray(score_i2t), np.asarray(score_t2i)
  text_to_image = np.asarray(text_to_image)
  images, texts = score_i2t.shape
  if score_t2i.shape != (texts, images) or text_to_image.shape != (texts,):
    raise ValueError(
      f"score_i2t is [{images}, {texts}], so score_t2i must be [{texts}, {images}] and"
      f" text_to_image [{texts}]; got {score_t2i.shape} and {text_to_image.shape}."
    )
  if np.isnan(score_i2t).any() or np.isnan(score_t2i).any():
    raise ValueError("retrieval: scores are NaN, so the model's parameters may be too.")
  unknown = (text_to_image < 0) | (text_to_image >= images)
  if unknown.any():
    raise ValueError(
      f"text {np.flatnonzero(unknown)[0]} belongs to image {text_to_image[unknown][0]},"
      f" but there are {images} images."
    )
  bare = np.setdiff1d(np.arange(images), text_to_image)
  if bare.size:
    raise ValueError(f"image {bare[0]} has no text: leave it out of the retrieval.")

  belongs_IT = text_to_image[None, :] == np.arange(images)[:, None]
  ways = {
    "i2t": best_rank(score_i2t, belongs_IT),
    "t2i": best_rank(score_t2i, belongs_IT.T),
  }
  out, means = {}, {}
  for way, ranks in ways.items():
    recalls = [100.0 * int(np.sum(ranks < k)) / len(ranks) for k in ks]
    out |= {f"{way}_r{k}": recall for k, recall in zip(ks, recalls, strict=True)}
    # Not `sum`, which rounds otherwise from Python 3.12 on.
    means[way] = float(np.mean(recalls))
  out |= {f"{way}_mean": mean for way, mean in means.items()}
  return out | {"mean": (means["i2t"] + means["t2i"]) / 2}


def best_rank(score: np.ndarray, right: np.ndarray) -> np.ndarray:
  """int [Q]: place of the best right candidate of each query, 0 for the first.

  score [Q, C]; right bool [Q, C], one true at least in each row. By counting, since
  sorting a large set's rows costs minutes.
  """
  best = np.where(right, score, -np.inf).max(axis=1, keepdims=True)
  tied = score == best
  column = np.arange(score.shape[1])
  last = np.where(right & tied, column, -1).max(axis=1, keepdims=True)
  return np.sum((score > best) | (tied & (column > last)), axis=1)


def ranking(score: np.ndarray, k: int) -> np.ndarray:
  """int [Q, k]: the best candidates of each row, best first, ties as in recall."""
  return np.argsort(score, axis=1, kind="stable")[:, ::-1][:, :k]


def chance_recall(
  text_to_image: np.ndarray, images: int, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
  """What a random ranking is expected to reach, in percent: keys "i2t_r1" …, "mean".

  With c of T texts right, all of the first k are wrong with probability
  C(T - c, k) / C(T, k).
  """
  counts = np.bincount(np.asarray(text_to_image), minlength=images)
  texts = int(counts.sum())
  out = {}
  for k in ks:
    taken = np.arange(min(k, texts))
    left = np.clip(texts - counts[:, None] - taken, 0, None)
    miss = np.prod(left / (texts - taken), axis=1)
    out[f"i2t_r{k}"] = 100.0 * float(np.mean(1.0 - miss))
    out[f"t2i_r{k}"] = 100.0 * min(k, images) / images
  return out | {"mean": sum(out.values()) / len(out)}
