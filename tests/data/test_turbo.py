"""JPEG windows by libjpeg-turbo and OpenCV: the same windows, files and refusals."""

import sys

import numpy as np
import pytest

from tests.data import pictures
from vlp_jax.data import ops_image
from vlp_jax.data import pp
from vlp_jax.data import turbo

SLOW = "decode|random_resized_crop({}, min_area=0.3)|flip"
FAST = "decode|random_resized_crop({}, min_area=0.3, by='turbo')|flip"


def run(text, data, seed=0):
  example = {"image": data, "caption": "a"}
  return pp.parse(text)(example, np.random.default_rng(seed))["image"]


def jpeg(height=96, width=128, seed=0, **fields):
  return pictures.encoded(pictures.pixels(height, width, seed), "JPEG", **fields)


@pytest.fixture(autouse=True)
def packages():
  """Those of the extra "fast"; one test below needs none."""
  pytest.importorskip("cv2")
  pytest.importorskip("simplejpeg")


@pytest.mark.parametrize("size", [32, 64, 200])
def test_windows_are_those_of_the_exact_way(size):
  """The same place of the image, mirrored or not: only the kernel is another."""
  for seed in range(12):
    data = jpeg(300, 400, seed, quality=95)
    fast, slow = (run(text.format(size), data, seed) for text in (FAST, SLOW))
    assert fast.shape == slow.shape == (size, size, 3)
    assert fast.dtype == np.uint8
    difference = np.abs(fast.astype(int) - slow)
    # Smooth pictures: a window moved by a pixel or the other mirror image differ more.
    assert difference.mean() < 2.5
    assert np.abs(fast[:, ::-1].astype(int) - slow).mean() > 4 * difference.mean()


def test_the_same_draws_the_same_pixels():
  data = jpeg()
  np.testing.assert_array_equal(run(FAST.format(24), data), run(FAST.format(24), data))
  assert (run(FAST.format(24), data) != run(FAST.format(24), data, seed=1)).any()


def test_large_files_are_decoded_at_a_reduced_scale():
  image = turbo.opened(jpeg(800, 1000))
  box = (100, 50, 900, 750)
  pixels, part = turbo._decoded(image, box, 100)
  assert 100 <= part[2] - part[0] < 400
  assert pixels.shape[0] < 400
  # And the part is where it was.
  scale = pixels.shape[1] / 1000
  np.testing.assert_allclose(part, np.array(box) * scale, atol=1)


@pytest.mark.parametrize(
  "fields", [dict(mode="L"), dict(mode="CMYK"), dict(kind="PNG"), dict(kind="WEBP")]
)
def test_other_files_come_out_as_rgb(fields):
  fields = dict(kind="JPEG") | fields
  data = pictures.encoded(pictures.pixels(96, 128), **fields)
  fast, slow = (run(text.format(40), data) for text in (FAST, SLOW))
  assert np.abs(fast.astype(int) - slow).mean() < 3


BROKEN = {
  "empty": b"",
  "text": b"no picture at all",
  "cut": jpeg()[:900],
  "header alone": jpeg()[:60],
  "bomb": pictures.wide_jpeg(),
  "zeros inside": jpeg()[:700] + bytes(400) + jpeg()[1100:],
  "ends early": jpeg()[:-2],
  "more behind": jpeg() + b"more",
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_same_files_are_passed_over(name):
  """What one way refuses, the other does, and for the same reason."""
  found = []
  for text in (SLOW, FAST):
    try:
      run(text.format(24), BROKEN[name])
      found.append(None)
    except ops_image.BadRecordError as error:
      found.append(error.reason)
  assert found[0] == found[1]
  if name in ("empty", "text", "cut", "header alone", "bomb"):
    assert found[0] is not None


def test_without_its_packages_it_says_how_to_get_them(monkeypatch):
  turbo.packages.cache_clear()
  monkeypatch.setitem(sys.modules, "simplejpeg", None)
  with pytest.raises(ValueError, match=r"simplejpeg.*pip install \"vlp-jax\[fast\]\""):
    pp.parse(FAST.format(24))
  pp.parse(SLOW.format(24))
  turbo.packages.cache_clear()


def test_unknown_ways_are_told():
  with pytest.raises(ValueError, match="by='tubro': want one of 'pillow', 'turbo'"):
    pp.parse("decode|random_resized_crop(8, by='tubro')")


def test_batches_are_a_function_of_seed_and_position():
  """Through the pipeline: bad files are counted, any start and process agrees."""
  from vlp_jax.data import pipeline

  records = [(jpeg(64, 80, i), ["a"]) for i in range(12)]
  records[5] = (BROKEN["cut"], ["a"])
  source = pictures.Source(tuple(records))

  def first(count, **fields):
    made = pipeline.train_batches(
      source,
      FAST.format(16),
      pictures.Tokenizer(),
      batch_size=4,
      seed=3,
      max_bad=1.0,
      **fields,
    )
    found = [next(made) for _ in range(count)]
    bad = dict(made.bad)
    made.close()
    return np.concatenate([batch["image"] for batch in found]), bad

  whole, bad = first(3)
  assert list(bad.values()) == [1]
  np.testing.assert_array_equal(first(2, start=4)[0], whole[4:])
  halves = [first(3, rows=np.arange(2) + 2 * i)[0] for i in (0, 1)]
  split = [half.reshape(3, 2, *half.shape[1:]) for half in halves]
  np.testing.assert_array_equal(
    np.concatenate(split, axis=1).reshape(whole.shape), whole
  )
