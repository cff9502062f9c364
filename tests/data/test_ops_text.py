"""Words on captions, against what the official code made of them."""

import json
import pathlib

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


@pytest.mark.parametrize(
  "text, said", [("clean(0)", "max_words=0"), ("clean(3, 'bert')", "'albef', 'blip'")]
)
def test_wrong_arguments(text, said):
  with pytest.raises(ValueError, match="pp: clean") as caught:
    pp.parse(text)
  assert said in str(caught.value)
