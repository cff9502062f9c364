"""Words on captions, against what the official code made of them."""

import json
import pathlib

import numpy as np
import pytest

from vlp_jax.data import ops_text
from vlp_jax.data import pp

CASES = json.loads(
  (pathlib.Path(__file__).parents[1] / "reference/preproc/text.json").read_text("utf-8")
)


@pytest.mark.parametrize("paper", ["albef", "blip"])
def test_captions_and_questions_are_those_of_the_official_code(paper):
  assert len(CASES[paper]) >= 15
  for case in CASES[paper]:
    text = case["text"]
    assert ops_text.pre_caption(text, 30, paper=paper) == case["pre_caption_30"]
    assert ops_text.pre_question(text, 25, paper=paper) == case["pre_question_25"]


def test_clean_is_a_word_about_the_caption_alone():
  example = {"image": b"untouched", "caption": "A dog-like animal / creature!"}
  out = pp.parse_captions("decode|resize(8)|clean(3)|randaugment")(example, None)
  assert out == {"image": b"untouched", "caption": "a dog like"}
  out = pp.parse_captions("clean(2, paper='blip')")(example, None)
  assert out["caption"] == "a dog-like"
  out = pp.parse_captions("clean(2)|prompt('a picture of ')")(example, None)
  assert out["caption"] == "a picture of a dog"
  out = pp.parse_captions("clean")({"caption": "x " * 40}, None)
  assert out["caption"] == " ".join(["x"] * 30)


def test_left_and_right_change_places_by_chance():
  """data/nlvr_dataset.py: whole words between spaces, and the images with them."""
  example = {"caption": "the left dog's left, upright and right of two right ones"}
  draw = lambda text, seed: pp.parse_captions(text)(
    example, np.random.default_rng(seed)
  )
  swapped = "the right dog's left, upright and left of two left ones"
  want = {"caption": swapped, "swapped": True}
  assert draw("swap_sides(1.0)", 0) == want
  assert draw("swap_sides(0.0)", 0) == example
  drawn = [draw("swap_sides", seed) for seed in range(400)]
  assert all(one in (example, want) for one in drawn)
  assert 160 < drawn.count(want) < 240
  assert draw("swap_sides", 7) == draw("swap_sides", 7)
  assert pp.swaps("decode|clean(3)|swap_sides") and not pp.swaps("decode|clean(3)")


@pytest.mark.parametrize(
  "text, said",
  [
    ("clean(0)", "pp: clean: max_words=0"),
    ("clean(3, 'bert')", "pp: clean: paper='bert'"),
    ("swap_sides(1.5)", "pp: swap_sides: p=1.5: a probability"),
  ],
)
def test_wrong_arguments(text, said):
  with pytest.raises(ValueError) as caught:
    pp.parse(text)
  assert said in str(caught.value)
