"""Images of several sizes on one canvas: the word `fit`, and batches of it."""

import pathlib

import numpy as np
import pytest

from tests.data import pictures
from vlp_jax.data import pipeline
from vlp_jax.data import pp
from vlp_jax.data.sources import scenes

REFERENCE = pathlib.Path(__file__).parents[1] / "reference" / "preproc"


def run(text, image):
  data = {"image": pictures.encoded(image), "caption": "a"}
  return pp.parse(text)(data, np.random.default_rng(0))


@pytest.mark.parametrize("name", ["wide", "tall", "small"])
def test_fit_is_pixel_bert_of_the_official_code(name):
  with np.load(REFERENCE / "images.npz") as images:
    image = images[name]
  with np.load(REFERENCE / "vilt.npz") as arrays:
    want = arrays[name]
  # pixelbert_transform(size=64): the longer side is at most 1333 / 800 of it.
  out = run("decode|fit(64, 106)", image)
  rows, columns = out["image_size"]
  assert (rows, columns) == want.shape[1:] and out["image_size"].dtype == np.int32
  assert out["image"].shape == (96, 96, 3)
  levels = ((want * 0.5 + 0.5) * 255).transpose(1, 2, 0)
  np.testing.assert_allclose(out["image"][:rows, :columns], levels, rtol=0, atol=1e-3)
  assert not out["image"][rows:].any() and not out["image"][:, columns:].any()


def test_fit_says_what_it_cannot_do():
  with pytest.raises(ValueError, match="want 32"):
    pp.parse("decode|fit(16, 48)")
  with pytest.raises(ValueError, match="last word on images"):
    pp.parse("decode|fit(64, 96)|flip")
  assert pp.leaves_sizes("decode|fit(64, 96)|clean(30)")
  assert not pp.leaves_sizes("decode|resize(64)")


class Words:
  """A tokenizer of one id a text."""

  def encode(self, texts):
    return np.ones((len(texts), 1), np.int32), np.ones((len(texts), 1), bool)


def test_batches_have_the_sizes():
  source = scenes.Source(res=48, size=8)
  words = "decode|fit(32, 80, 16)"
  batches = pipeline.train_batches(source, words, Words(), batch_size=4, seed=0)
  batch = next(batches)
  assert batch["image"].shape == (4, 80, 80, 3)
  np.testing.assert_array_equal(batch["image_size"], np.full((4, 2), 32))
  with pytest.raises(ValueError, match="without padding"):
    next(pipeline.eval_images(source, words, batch_size=4))
