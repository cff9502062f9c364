"""The pp string: order, arguments, and what it says when it is wrong."""

import numpy as np
import pytest

from tests.data import pictures
from vlp_jax.data import pp


def run(text, image=None):
  image = pictures.encoded(pictures.pixels()) if image is None else image
  example = {"image": image, "caption": "A dog.", "extra": 3}
  return pp.parse(text)(example, np.random.default_rng(0))


def test_words_run_from_left_to_right():
  assert run("decode|resize_shorter(20)|center_crop(16)")["image"].shape == (16, 16, 3)
  assert run("decode|center_crop(16)|resize_shorter(20)")["image"].shape == (20, 20, 3)


def test_other_fields_stay_and_the_given_example_too():
  example = {"image": pictures.encoded(pictures.pixels()), "caption": "A dog.", "x": 3}
  before = dict(example)
  out = pp.parse("decode|resize(8)|clean")(example, np.random.default_rng(0))
  assert example == before
  assert out["x"] == 3 and out["caption"] == "a dog"


def test_spaces_and_named_arguments():
  plain = run("decode|random_resized_crop(8,0.5)|flip")["image"]
  spaced = run("  decode | random_resized_crop( size=8, min_area = 0.5 ) |flip() ")
  np.testing.assert_array_equal(plain, spaced["image"])


def test_decode_alone_gives_pixels():
  out = run("decode")["image"]
  assert isinstance(out, np.ndarray) and out.dtype == np.uint8
  np.testing.assert_array_equal(out, pictures.pixels())


def test_words_are_the_public_ops():
  assert set(pp.words()) == {
    "decode", "resize", "resize_shorter", "center_crop", "random_resized_crop", "flip",
    "randaugment", "clean", "fit", "random_crop", "naflex", "prompt", "regions",
    "swap_sides",
  }  # fmt: skip


@pytest.mark.parametrize(
  "text, parts",
  [
    ("decode|resise(64)", ("no word 'resise'", "did you mean 'resize'?", "There are:")),
    ("decode|zzzz", ("no word 'zzzz'", "There are: center_crop")),
    ("decode|resize", ("resize", "missing", "'size'", "resize takes: size.")),
    ("decode|resize(6, 4)", ("resize", "too many", "takes: size.")),
    ("decode|resize('64')", ("size='64'", "of type str, want int")),
    ("decode|resize(64.0)", ("size=64.0", "of type float, want int")),
    ("decode|resize(True)", ("size=True", "of type bool, want int")),
    ("decode|resize(0)", ("resize", "size=0", "want 1 or more")),
    ("decode|random_resized_crop(8, min_arae=1)", ("'min_arae'", "mean 'min_area'?")),
    ("decode|random_resized_crop(8, min_area=0.0)", ("min_area=0.0", "want 0 <")),
    ("decode|random_resized_crop(8, min_area=0.9, max_area=0.5)", ("max_area=0.5",)),
    ("decode|random_resized_crop(8, min_ratio=2.0)", ("min_ratio=2.0",)),
    ("decode|flip(1.5)", ("flip", "p=1.5", "0 … 1")),
    ("decode|randaugment(0)", ("n=0",)),
    ("decode|randaugment(2, 11)", ("m=11", "0 … 10")),
    ("decode|resize(size)", ("'resize(size)'", "not expressions")),
    ("decode|resize(64", ("does not parse", "words joined by |")),
    ("decode||flip", ("does not parse",)),
    ("decode|ops.flip", ("'ops.flip'", "is no word")),
    ("decode|64", ("'64'", "is no word")),
    (["decode"], ("want a string", "['decode']")),
  ],
)
def test_mistakes_are_told_before_anything_runs(text, parts):
  with pytest.raises(ValueError, match="^pp: ") as caught:
    pp.parse(text)
  for part in parts:
    assert part in str(caught.value)


@pytest.mark.parametrize("text", ["", "clean(30)", "resize(8)|decode", "flip"])
def test_decode_comes_first(text):
  with pytest.raises(ValueError, match="^pp: .* lacks decode (before|for)"):
    pp.parse(text)


def test_decode_twice():
  with pytest.raises(ValueError, match="says decode twice"):
    pp.parse("decode|resize(8)|decode")


def test_words_on_captions_may_stand_anywhere():
  assert run("clean|decode|clean(1)")["caption"] == "a"
  assert pp.parse_captions("")({"caption": "A dog."}, None) == {"caption": "A dog."}
