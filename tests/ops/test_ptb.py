"""Tokens of captions, against those of the official program."""

import json
import pathlib

import pytest

from vlp_jax.ops import ptb

REFERENCE = pathlib.Path(__file__).parents[1] / "reference" / "metric_caption"


def test_the_tokens_of_the_official_program():
  """tests/reference/metric_caption: the jar of coco-caption on 200 captions."""
  raw = json.loads((REFERENCE / "captions_raw.json").read_text())
  want = json.loads((REFERENCE / "captions_tokenized.json").read_text())
  for image, captions in raw["gts"].items():
    got = [" ".join(ptb.tokenize(caption)) for caption in captions]
    assert got == want["gts"][image]
  for image, caption in raw["res"].items():
    assert " ".join(ptb.tokenize(caption)) == want["res"][image]


def test_captions_of_coco_and_flickr8k():
  """Those of val2017 and Flickr8k that have more than words and a full stop."""
  pairs = json.loads((REFERENCE / "ptb_tokenizer_pairs.json").read_text())
  for caption, tokens in pairs:
    assert " ".join(ptb.tokenize(caption)) == tokens


@pytest.mark.parametrize(
  "caption, tokens",
  [
    ("A man's dog isn't here.", "a man 's dog is n't here"),
    ("They can't, won't and cannot!", "they ca n't wo n't and can not"),
    ('The "old" one (on the left)', "the old one -lrb- on the left -rrb-"),
    ("two-tone t-shirts, 3-year-old", "two-tone t-shirts 3-year-old"),
    (
      "1,000 people at 10:30 a.m. in the U.S.",
      "1,000 people at 10:30 a.m. in the u.s.",
    ),
    ("$5 & 50% of it...", "$ 5 & 50 % of it"),
    ("at 5 o'clock - or six -- later", "at 5 o'clock or six later"),
    ("black/white, 1/2 full", "black/white 1/2 full"),
    ("Mr. Smith's. The end", "mr. smith 's the end"),
    ("Rock'n'roll on Main St. AT&T", "rock 'n' roll on main st. at&t"),
    ("on plan B. The car wash.", "on plan b the car wash"),
    ("'Tis no. 5, y'all :)", "'t is no. 5 y' all :-rrb-"),
    ("", ""),
  ],
)
def test_rules(caption, tokens):
  assert " ".join(ptb.tokenize(caption)) == tokens
