"""Regions of a detector as data: their file, the rows of a batch, bad input."""

import io
import json

import numpy as np
import pytest

from tests.data import pictures
from vlp_jax.data import evaluation
from vlp_jax.data import pipeline
from vlp_jax.data import pp
from vlp_jax.data import regions
from vlp_jax.data import scene_regions
from vlp_jax.data.decode import BadRecordError
from vlp_jax.data.sources import scenes
from vlp_jax.data.sources import table

PP = "regions(6, features=8, classes=5, fewest=2)"


def arrays(count=4, features=8, classes=5, seed=0):
  rng = np.random.default_rng(seed)
  corner = rng.uniform(0, 40, (count, 2))
  boxes = np.concatenate([corner, corner + rng.uniform(5, 20, (count, 2))], axis=1)
  return dict(
    features=rng.normal(size=(count, features)).astype(np.float16),
    boxes=boxes.astype(np.float32),
    size=np.array([64, 48]),
    soft_labels=rng.dirichlet(np.ones(classes), count).astype(np.float16),
    conf=np.linspace(0.9, 0.1, count).astype(np.float32),
  )


def file(**changed):
  out = io.BytesIO()
  np.savez(out, **{k: v for k, v in (arrays() | changed).items() if v is not None})
  return out.getvalue()


def run(data, text=PP):
  example = {"image": data, "caption": "A dog."}
  return pp.parse(text)(example, np.random.default_rng(0))["image"]


def test_rows_are_features_place_classes_and_one():
  given = arrays()
  got = run(file())
  assert got.shape == (6, 8 + 7 + 5 + 1) and got.dtype == np.float32
  # Surer than 0.2 are the first three, which the fourth is not.
  np.testing.assert_array_equal(got[:, -1], [1, 1, 1, 0, 0, 0])
  assert not got[3:].any()
  np.testing.assert_array_equal(got[:3, :8], np.float32(given["features"][:3]))
  for row, (x1, y1, x2, y2) in zip(got, given["boxes"][:3], strict=False):
    w, h = (x2 - x1) / 64, (y2 - y1) / 48
    want = [x1 / 64, y1 / 48, x2 / 64, y2 / 48, w, h, w * h]
    np.testing.assert_allclose(row[8:15], want, rtol=1e-5)
  np.testing.assert_array_equal(got[:3, 15:20], np.float32(given["soft_labels"][:3]))


def test_the_official_files_of_uniter():
  """Boxes come normed; others of their arrays say nothing here."""
  norm = np.float16(np.random.default_rng(0).uniform(0, 1, (4, 6)))
  got = run(file(boxes=None, size=None, norm_bb=norm, argmax=np.arange(4)))
  np.testing.assert_array_equal(got[:3, 8:14], np.float32(norm[:3]))
  area = np.float32(norm[:3, 4]) * np.float32(norm[:3, 5])
  np.testing.assert_allclose(got[:3, 14], area, rtol=1e-6)


@pytest.mark.parametrize(
  "conf, count",
  [
    ([0.9, 0.8, 0.1, 0.1, 0.1], 2),
    ([0.9, 0.1, 0.1, 0.1, 0.1], 2),  # at least `fewest`
    ([0.9] * 5, 4),  # at most `most`
    (None, 4),  # no confidence: all count
  ],
)
def test_how_many_count(conf, count):
  more = arrays(5) | dict(conf=None if conf is None else np.float32(conf))
  got = run(file(**more), "regions(4, features=8, classes=5, fewest=2)")
  assert got[:, -1].sum() == count


def test_vlp_reads_boxes_by_their_largest_coordinates():
  given = arrays()
  text = "regions(6, 'vlp', features=8, classes=5, fewest=1, threshold=0.0)"
  got = run(file(), text)
  assert got.shape == (6, 8 + 6 + 5 + 1)
  np.testing.assert_array_equal(got[:, -1], [1, 1, 1, 1, 0, 0])
  boxes = np.concatenate([given["boxes"], np.zeros((4, 1)), given["conf"][:, None]], 1)
  want = regions.places(boxes, np.float32(given["soft_labels"]))
  np.testing.assert_array_equal(got[:4, 8:-1], want)
  with pytest.raises(BadRecordError, match="boxes, in pixels, which VLP scales"):
    run(file(boxes=None, size=None, norm_bb=np.zeros((4, 6))), text)


def test_objectives_without_classes():
  got = run(file(soft_labels=None), "regions(6, features=8, classes=0, fewest=1)")
  assert got.shape == (6, 8 + 7 + 1)


@pytest.mark.parametrize(
  "data, reason",
  [
    (b"", "empty file"),
    (b"PK and no more", "no .npz of regions"),
    (file()[:-40], "no .npz of regions"),
    (file(features=np.array([{}] * 4)), "no .npz of regions"),  # a pickle
    (file(features=None), "regions lack arrays"),
    (file(boxes=None), "regions lack arrays"),
    (file(features=np.zeros((3, 8))), "regions do not go together"),
    (file(boxes=np.zeros((4, 5))), "regions do not go together"),
    (file(features=np.full((4, 8), np.nan)), "regions are not finite"),
    (file(**arrays(0)), "no regions"),
    (file(features=np.zeros((4, 9))), "regions of another width"),
    (file(soft_labels=np.zeros((4, 4))), "regions of other classes"),
    (file(soft_labels=None), "regions of other classes"),
  ],
)
def test_broken_files_are_broken_records(data, reason):
  with pytest.raises(BadRecordError) as error:
    run(data)
  assert error.value.reason == reason


def test_a_bomb_is_refused(monkeypatch):
  monkeypatch.setattr(regions, "MAX_BYTES", 100)
  with pytest.raises(BadRecordError, match="too large"):
    run(file())


@pytest.mark.parametrize(
  "text, said",
  [
    ("regions(0)", "want 1 <= fewest <= most"),
    ("regions(5)", "most=5, fewest=10"),
    ("regions(20, features=0)", "features=0"),
    ("regions(20, 'butd')", "layout='butd': want one of 'uniter', 'vlp'"),
    ("regions(20)|flip", "regions(…) reads no pixels: leave out flip"),
    ("decode|regions(20)", "regions(…) reads no pixels: leave out decode"),
  ],
)
def test_words_that_are_wrong(text, said):
  with pytest.raises(ValueError) as error:
    pp.parse(text)
  assert said in str(error.value)


def test_words_on_captions_go_on():
  text = f"{PP}|clean(5)"
  assert pp.leaves_regions(text) and not pp.leaves_regions("decode|resize(8)")
  assert pp.parse_captions(text)({"caption": "A Dog!"}, None)["caption"] == "a dog"


# --- From a table of images to a batch ---


@pytest.fixture
def folder(tmp_path):
  """A table of twelve images, and an .npz beside eleven of them."""
  for i in range(11):
    regions.save(tmp_path / f"{i}.npz", **arrays(seed=i))
  rows = [{"image": f"{i}.jpg", "caption": f"number {i}"} for i in range(12)]
  path = tmp_path / "pairs.jsonl"
  path.write_text("\n".join(map(json.dumps, rows)))
  return path


def batches(source, **fields):
  given = dict(batch_size=6, seed=0, max_bad=1.0) | fields
  return pipeline.train_batches(source, PP, pictures.Tokenizer(), **given)


def test_batches_of_a_table(folder):
  made = batches(table.Source(str(folder), suffix=".npz"))
  batch = next(made)
  assert batch["image"].shape == (6, 6, 21) and batch["image"].dtype == np.float32
  for row, number in zip(batch["image"], batch["image_id"], strict=True):
    want = np.float32(arrays(seed=int(number))["features"][:3])
    np.testing.assert_array_equal(row[:3, :8], want)
  next(made)
  # The image without regions is passed over and counted, and another is read for it.
  assert made.bad == {"file is missing": 1}
  made.close()


def test_no_regions_at_all_are_told_at_once(folder, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"none of its first 12 .npz files is"):
    table.Source(str(folder), root=str(tmp_path.parent), suffix=".npz")
  with pytest.raises(ValueError, match=r"suffix='npz': want one like '.npz'"):
    table.Source(str(folder), suffix="npz")


def test_an_evaluation_reads_them_too(folder):
  rows = folder.read_text().splitlines()[:11]
  folder.write_text("\n".join(rows))
  source = table.Source(str(folder), suffix=".npz")
  found = list(evaluation.eval_images(source, PP, batch_size=4))
  assert [batch["image"].shape for batch in found] == [(4, 6, 21)] * 3
  pairs = next(
    iter(evaluation.eval_pairs(source, PP, pictures.Tokenizer(), batch_size=4))
  )
  np.testing.assert_array_equal(pairs["image"], found[0]["image"])


# --- Regions of rendered scenes ---


def test_scenes_have_regions():
  source = scenes.Source(size=20, res=48, regions=5)
  one, again = (source.read(np.array([3, 4])) for _ in range(2))
  assert [r["image"] for r in one] == [r["image"] for r in again]
  plain = scenes.Source(size=20, res=48).read(np.array([3, 4]))
  assert [r["captions"] for r in one] == [r["captions"] for r in plain]
  for raw in one:
    found = regions.load(raw["image"])
    assert found["features"].shape == (5, scene_regions.FEATURES)
    assert (found["boxes"] >= 0).all() and (found["boxes"] <= 48).all()
    assert (np.diff(found["conf"]) <= 0).all()
    best = [scene_regions.CLASSES[i] for i in found["soft_labels"].argmax(axis=1)]
    sure = found["conf"] > 0.5
    # Each thing that the caption names is found, and nothing else.
    assert all(
      (name == "ground") == (not s) for name, s in zip(best, sure, strict=True)
    )
    for name in np.array(best)[sure]:
      assert name in raw["captions"][0]
  with pytest.raises(ValueError, match="regions=1: want 0, or 2 or more"):
    scenes.Source(size=20, regions=1)


def test_features_tell_what_a_region_shows():
  """The same of the same pixels, another of another colour."""
  image = np.full((48, 48, 3), 240, np.uint8)
  image[:10, :10] = (250, 20, 20)
  image[30:40, 30:40] = (20, 20, 250)
  red, blue, ground = (
    scene_regions.features(image, np.float32([at, at, at + 10, at + 10]))
    for at in (0, 30, 15)
  )
  image[20:, 20:] = 0
  again = scene_regions.features(image, np.float32([0, 0, 10, 10]))
  np.testing.assert_array_equal(red, again)
  apart = lambda a, b: np.linalg.norm(a - b)
  assert min(apart(red, blue), apart(red, ground), apart(blue, ground)) > 1.0
