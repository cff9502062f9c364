"""Retrieval metrics against the official code and against slow, obvious numpy."""

import pathlib

import numpy as np
import pytest

from vlp_jax.ops import metrics

# Inputs and results of salesforce/ALBEF (commit b9727e4) Retrieval.py itm_eval, with
# each score replaced by its rank in its row, which keeps order and ties.
REFERENCE = pathlib.Path(__file__).parents[1] / "reference" / "metric_retrieval.npz"
OFFICIAL = {"i2t": "txt", "t2i": "img"}


@pytest.mark.parametrize("case", ["full", "topk", "uneven"])
def test_equals_the_official_code_exactly(case):
  data = np.load(REFERENCE)
  got = metrics.retrieval_recall(
    data[f"{case}/score_i2t"], data[f"{case}/score_t2i"], data[f"{case}/text_to_image"]
  )
  for ours, theirs in OFFICIAL.items():
    for k in (1, 5, 10):
      assert got[f"{ours}_r{k}"] == data[f"expected/{case}/{theirs}_r{k}"]
    assert got[f"{ours}_mean"] == data[f"expected/{case}/{theirs}_r_mean"]
  assert got["mean"] == data[f"expected/{case}/r_mean"]


def test_equal_scores_rank_as_in_a_stable_reversed_argsort():
  rng = np.random.default_rng(0)
  owner = rng.permutation(np.arange(40) % 12)
  i2t = rng.integers(0, 3, (12, 40)).astype(np.float32)  # ties everywhere
  t2i = rng.integers(0, 3, (40, 12)).astype(np.float32)
  got = metrics.retrieval_recall(i2t, t2i, owner, ks=(1, 3))
  i2t_ranks = [
    min(
      list(np.argsort(row, kind="stable")[::-1]).index(t)
      for t in np.where(owner == i)[0]
    )
    for i, row in enumerate(i2t)
  ]
  t2i_ranks = [
    list(np.argsort(row, kind="stable")[::-1]).index(owner[t])
    for t, row in enumerate(t2i)
  ]
  for k in (1, 3):
    assert got[f"i2t_r{k}"] == 100.0 * np.sum(np.array(i2t_ranks) < k) / 12
    assert got[f"t2i_r{k}"] == 100.0 * np.sum(np.array(t2i_ranks) < k) / 40


def test_ranking_agrees_with_recall():
  rng = np.random.default_rng(1)
  score = rng.integers(0, 4, (20, 9)).astype(np.float32)
  right = rng.permutation(9)[rng.integers(0, 9, 20)][:, None] == np.arange(9)
  ranks = metrics.best_rank(score, right)
  order = metrics.ranking(score, 9)
  np.testing.assert_array_equal(order[np.arange(20), ranks], np.argmax(right, 1))


def test_a_collapsed_model_is_at_chance():
  got = metrics.retrieval_recall(np.zeros((50, 50)), np.zeros((50, 50)), np.arange(50))
  assert got["i2t_r1"] == got["t2i_r1"] == 2.0 and got["i2t_r10"] == 20.0


def test_chance():
  owner = np.repeat(np.arange(20), 5)
  got = metrics.chance_recall(owner, 20)
  assert got["t2i_r1"] == 5.0 and got["t2i_r10"] == 50.0
  assert got["i2t_r1"] == pytest.approx(5.0)
  rng = np.random.default_rng(0)
  drawn = [
    metrics.retrieval_recall(rng.random((20, 100)), rng.random((100, 20)), owner)[
      "i2t_r5"
    ]
    for _ in range(200)
  ]
  # Standard error of the mean of 200 draws of 20 images: below 0.7 points.
  assert np.mean(drawn) == pytest.approx(got["i2t_r5"], abs=2.5)


@pytest.mark.parametrize(
  "i2t, t2i, owner, message",
  [
    (np.zeros((2, 3)), np.zeros((2, 3)), [0, 0, 1], r"score_t2i must be \[3, 2\]"),
    (np.zeros((2, 3)), np.zeros((3, 2)), [0, 0], "text_to_image"),
    (np.zeros((2, 3)), np.zeros((3, 2)), [0, 0, 0], "image 1 has no text"),
    (np.zeros((2, 3)), np.zeros((3, 2)), [0, 1, 2], "text 2 belongs to image 2"),
    (np.full((1, 1), np.nan), np.zeros((1, 1)), [0], "NaN"),
  ],
)
def test_wrong_input(i2t, t2i, owner, message):
  with pytest.raises(ValueError, match=message):
    metrics.retrieval_recall(i2t, t2i, np.array(owner))
