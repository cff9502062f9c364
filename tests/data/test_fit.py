"""Images of several sizes on one canvas: the word `fit`, and batches of it."""

import pathlib

import numpy as np
import pytest

from tests.data import pictures
from vlp_jax.data import evaluation
from vlp_jax.data import ops_image
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
    next(evaluation.eval_images(source, words, batch_size=4))


def test_naflex_is_a_row_of_patches_with_its_grid():
  image = np.random.default_rng(0).integers(0, 256, (30, 90, 3), np.uint8)
  out = run("decode|naflex(32, 8)", image)
  # One row of eight or two of six: as many of sixteen patches as the ratio allows.
  assert out["image_size"].tolist() == [2, 6] and out["image"].shape == (32, 32, 3)
  row = (
    out["image"].reshape(4, 8, 4, 8, 3).transpose(0, 2, 1, 3, 4).reshape(16, 8, 8, 3)
  )
  assert not row[12:].any() and row[:12].any(axis=(1, 2, 3)).all()
  whole = row[:12].reshape(2, 6, 8, 8, 3).transpose(0, 2, 1, 3, 4).reshape(16, 48, 3)
  want = run("decode|resize(16)", image)["image"]  # the same rows, fewer columns
  got = whole.reshape(16, 16, 3, 3).mean(axis=2)
  assert np.abs(got - want.astype(np.float32)).mean() < 8
  assert ops_image.naflex_grid(10, 10, patch=16, most=256) == (16, 16)
  assert ops_image.naflex_grid(1, 1000, patch=16, most=256) == (1, 256)
  assert pp.leaves_sizes("decode|naflex(32, 8)") and pp.leaves_grids(
    "decode|naflex(32, 8)"
  )
  with pytest.raises(ValueError, match="naflex pads, so it is the last word"):
    pp.parse("decode|naflex(32, 8)|flip")
