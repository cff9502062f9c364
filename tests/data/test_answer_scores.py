"""Soft scores of answers, from a table to a column of the batch."""

import json

import numpy as np
import pytest

from tests.data import pictures
from vlp_jax.data import columns
from vlp_jax.data.sources import task
from vlp_jax.objectives import vqa_scores


def table(folder, *scores):
  image = folder / "a.png"
  image.write_bytes(pictures.encoded(pictures.pixels(8, 8)))
  rows = [
    {"image": "a.png", "question": "what is it?", "answer_scores": s} for s in scores
  ]
  path = folder / "vqa.json"
  path.write_text(json.dumps(rows))
  return task.Source(str(path))


def test_scores_stand_where_their_numbers_say(tmp_path):
  source = table(tmp_path, {"2": 1, "0": 0.3}, {})
  objectives = {"vqa": vqa_scores.Objective(width=8, answers=4)}
  wanted = columns.of(objectives, res=8)
  rows = [wanted.example(raw, None, None) for raw in source.read(np.arange(2))]
  got = wanted.batch(rows, None)["answer_scores"]
  np.testing.assert_array_equal(got, np.float32([[0.3, 0, 1, 0], [0] * 4]))
  assert got.dtype == np.float32
  few = columns.of({"vqa": vqa_scores.Objective(width=8, answers=2)}, res=8)
  with pytest.raises(ValueError, match=r"answer 2 .*vqa_scores.answers=2"):
    few.batch(rows, None)


@pytest.mark.parametrize("scores", [{"0": 2}, {"-1": 0.5}, {"red": 1}, [1, 2]])
def test_scores_that_are_none_are_told(tmp_path, scores):
  with pytest.raises(ValueError, match='row 1: "answer_scores" wants'):
    len(table(tmp_path, scores))
