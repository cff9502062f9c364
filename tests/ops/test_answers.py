"""VQA's accuracy, against the official code."""

import json
import pathlib

import pytest

from vlp_jax.ops import answers

REFERENCE = pathlib.Path(__file__).parents[1] / "reference" / "metric_vqa"


def read(name):
  return json.loads((REFERENCE / f"{name}.json").read_text())


@pytest.mark.parametrize("row", read("normalisation"), ids=lambda row: row["text"])
def test_cleaning(row):
  marks = answers.clean_marks(row["text"])
  assert marks == row["punctuation"]
  assert answers.clean_words(row["text"]) == row["digit_article"]
  assert answers.clean_words(marks) == row["both"]


def test_real_answers():
  """3,000 of VQA v2, of which half change."""
  for text, clean in read("normaliser_pairs"):
    assert answers.clean_words(answers.clean_marks(text)) == clean


def test_accuracies():
  inputs, expected = read("inputs"), read("expected")
  assert len(inputs["gts"]) == 60
  for number, question in inputs["gts"].items():
    given = [row["answer"] for row in question["answers"]]
    got = answers.accuracy(inputs["res"][number]["answer"], given)
    assert round(100 * got, 2) == expected["perQuestion"][number]


def test_what_all_say_is_not_cleaned():
  """An official quirk: the answer must then be theirs to the letter."""
  assert answers.accuracy("red.", ["red"] * 10) == 0.0
  assert answers.accuracy("red.", ["red"] * 9 + ["blue"]) == 1.0


@pytest.mark.parametrize("count, want", [(1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0)])
def test_how_many_say_so(count, want):
  given = ["cat"] * count + [f"dog {i}" for i in range(10 - count)]
  assert answers.accuracy("a Cat", given) == pytest.approx(want)
