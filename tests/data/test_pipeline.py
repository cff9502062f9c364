"""Batches by position: order, randomness, processes, broken records, evaluation."""

import collections
import functools
import itertools
import logging
import os
import pathlib
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from tests.data import pictures
from vlp_jax.data import evaluation
from vlp_jax.data import pipeline
from vlp_jax.data import pp
from vlp_jax.data import records
from vlp_jax.data import shuffle

PP = "decode|random_resized_crop(8)|flip|randaugment(2, 7)|clean(30)"
TOKENIZER = pictures.Tokenizer()


def batches(source, count, *, batch_size=4, seed=0, words=PP, **fields):
  """The first `count` batches."""
  made = pipeline.train_batches(
    source, words, TOKENIZER, batch_size=batch_size, seed=seed, **fields
  )
  return list(itertools.islice(made, count))


def ids(made):
  return np.concatenate([batch["image_id"] for batch in made]).tolist()


def assert_same(first, second):
  assert len(first) == len(second)
  for a, b in zip(first, second, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


# --- What a batch is ------------------------------------------------------------------


def test_shapes_and_dtypes():
  (batch,) = batches(pictures.source(10), 1)
  assert {key: (value.dtype.name, value.shape) for key, value in batch.items()} == dict(
    image=("uint8", (4, 8, 8, 3)),
    text=("int32", (4, 16)),
    text_mask=("bool", (4, 16)),
    image_id=("int32", (4,)),
  )


def test_a_sample_is_like_a_batch_and_begins_nothing(monkeypatch):
  """It comes without TensorFlow, from the whole source, and changes no order."""
  source = pictures.source(40)
  make = lambda: pipeline.train_batches(source, PP, TOKENIZER, batch_size=16, seed=0)
  made, untouched = make(), make()
  with monkeypatch.context() as patch:
    patch.setattr(pipeline, "tensorflow", lambda: pytest.fail("imported too early"))
    sample = made.sample()
  ends = source.read(np.array([0, len(source) - 1]))
  assert ids([sample])[0] == ends[0]["image_id"]
  assert ids([sample])[-1] == ends[-1]["image_id"]
  first = next(made)
  kinds = lambda batch: {k: (v.dtype, v.shape[1:]) for k, v in batch.items()}
  assert kinds(sample) == kinds(first)
  assert_same([first, next(made)], [next(untouched), next(untouched)])
  for each in (made, untouched):
    each.close()


def test_the_first_batches_need_no_tensorflow(monkeypatch):
  """They are those of tf.data, which goes on behind them."""
  source = pictures.source(20, captions=2)
  wanted = batches(source, 8, seed=3, start=4)
  asked, here = [], False

  def is_here(*, wanted):
    asked.append(wanted)
    return here

  monkeypatch.setattr(pipeline, "is_here", is_here)
  made = pipeline.train_batches(source, PP, TOKENIZER, batch_size=4, seed=3, start=4)
  with monkeypatch.context() as patch:
    patch.setattr(pipeline, "tensorflow", lambda: pytest.fail("imported too early"))
    found = [next(made) for _ in range(5)]
  assert asked == [False, False, True, True, True]
  here = True
  found += [next(made) for _ in range(3)]
  made.close()
  assert_same(found, wanted)


def test_early_batches_of_pieces(monkeypatch):
  source = pictures.source(20)
  fields = dict(batch_size=8, pieces=2, runs=2)
  wanted = batches(source, 6, **fields)
  monkeypatch.setattr(pipeline, "is_here", lambda wanted: False)
  assert_same(batches(source, 6, **fields), wanted)


def test_early_batches_tell_of_broken_records_and_of_errors(monkeypatch, tmp_path):
  monkeypatch.setattr(pipeline, "is_here", lambda wanted: False)

  class Source:
    def __len__(self):
      return 4

    def read(self, indices):
      raise OSError("the disk is gone")

  made = pipeline.train_batches(Source(), PP, TOKENIZER, batch_size=2, seed=0)
  with pytest.raises(OSError, match="the disk is gone"):
    next(made)
  made.close()
  assert next(made, None) is None


def test_tensorflow_that_cannot_be_imported_is_told(monkeypatch):
  def missing():
    raise ImportError("no tensorflow here")

  monkeypatch.setattr(pipeline, "tensorflow", functools.cache(missing))
  monkeypatch.setattr(
    pipeline, "_importing", functools.cache(pipeline._importing.__wrapped__)
  )
  assert not pipeline.is_here(wanted=False)
  assert not pipeline._importing.cache_info().currsize
  with pytest.raises(ImportError, match="no tensorflow here"):
    while not pipeline.is_here(wanted=True):
      time.sleep(0.01)


def test_what_is_closed_keeps_no_batches():
  made = pipeline.train_batches(pictures.source(4), PP, TOKENIZER, batch_size=2, seed=0)
  kept = made._loaded
  next(made)
  until = time.monotonic() + 60
  while not kept and time.monotonic() < until:
    time.sleep(0.01)
  assert kept
  made.close()
  assert not kept and next(made, None) is None


def test_what_is_closed_before_it_begins_has_no_batches():
  made = pipeline.train_batches(pictures.source(4), PP, TOKENIZER, batch_size=2, seed=0)
  made.close()
  assert next(made, None) is None


def test_rows_are_of_one_example_each():
  source = pictures.source(7, captions=2)
  whole = pp.parse("decode|resize(8)")
  for batch in batches(source, 4, words="decode|resize(8)"):
    for image, text, mask, image_id in zip(*batch.values(), strict=True):
      (raw,) = source.read([image_id])
      want = whole({"image": raw["image"], "caption": ""}, None)["image"]
      np.testing.assert_array_equal(image, want)
      assert TOKENIZER.decode(text[mask]) in raw["captions"]


def test_each_word_does_the_same_alone_and_in_the_pipeline():
  source = pictures.source(5)
  for word in ("random_resized_crop(8)", "flip", "randaugment(2, 7)", "clean(1)"):
    words = f"decode|resize(8)|{word}"
    op = pp.parse(words)
    (batch,) = batches(source, 1, batch_size=5, seed=3, words=words)
    for position, image_id in enumerate(batch["image_id"]):
      (raw,) = source.read([image_id])
      rng = np.random.default_rng((3, position, 0))
      want = op({"image": raw["image"], "caption": raw["captions"][0]}, rng)
      np.testing.assert_array_equal(batch["image"][position], want["image"])
      text = batch["text"][position]
      assert TOKENIZER.decode(text) == want["caption"]


# --- Pieces ---------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [np.arange(16), np.arange(8, 16)])
def test_a_batch_in_pieces_is_the_batch(rows):
  # Runs of four rows, of which each of two pieces has two.
  source = pictures.source(50)
  where = dict(rows=rows, start=16)
  runs = len(rows) // 4
  whole = batches(source, 2, batch_size=16, **where)
  pieces = batches(source, 4, batch_size=16, pieces=2, runs=runs, **where)
  for i, batch in enumerate(whole):
    for key, value in batch.items():
      parts = [p[key].reshape(runs, 2, *value.shape[1:]) for p in pieces[2 * i :][:2]]
      together = np.stack(parts, axis=1).reshape(value.shape)
      np.testing.assert_array_equal(together, value)


def test_pieces_that_the_rows_do_not_make():
  with pytest.raises(
    ValueError, match="batch_size=16: the 16 rows of a process do not"
  ):
    batches(pictures.source(5), 1, batch_size=16, pieces=3, runs=4)


# --- Order ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 64, 100, 1000])
def test_every_epoch_is_another_permutation(size):
  positions = np.arange(4 * size)
  indices = shuffle.shuffled(positions, size, 0).reshape(4, size)
  for epoch in indices:
    assert sorted(epoch) == list(range(size))
  if size > 5:  # of 5 there are 120, and two may be the same
    assert len({tuple(epoch) for epoch in indices}) == 4
    other = shuffle.shuffled(positions, size, 1).reshape(4, size)
    assert not (other == indices).all(axis=1).any()


@pytest.mark.parametrize("size, block", [(4, 4), (12, 2), (60, 5), (64, 1)])
def test_blocks_stay_together(size, block):
  moved = shuffle.shuffled(np.arange(3 * size), size, 0, block=block)
  runs = moved.reshape(3, -1, block)
  assert (runs - runs[:, :, :1] == np.arange(block)).all()
  order = runs[:, :, 0] // block
  assert (np.sort(order) == np.arange(size // block)).all()
  if size > block:
    assert (order[0] != order[1]).any()
  alone = shuffle.shuffled(np.arange(3 * size // block), size // block, 0)
  np.testing.assert_array_equal(order.ravel(), alone)


@pytest.mark.parametrize("seed", [0, 7])  # a key of zeros is the hardest
@pytest.mark.parametrize("size", [10, 60, 257, 1000, 6000])
def test_the_order_has_no_pattern(size, seed):
  epochs = shuffle.shuffled(np.arange(100 * size), size, seed)
  epochs = epochs.reshape(100, size)
  # Correlations in standard errors: their mean square over 100 epochs is 1 ± 0.14.
  pairs = dict(
    order=[(np.arange(size), epoch) for epoch in epochs],
    neighbours=[(epoch[1:], epoch[:-1]) for epoch in epochs],
    epochs=list(itertools.pairwise(epochs)),
  )
  for name, of in pairs.items():
    correlations = np.array([np.corrcoef(a, b)[0, 1] for a, b in of])
    assert 0.5 < (correlations**2).mean() * size < 1.6, name
  # What comes first: any example as often.
  tenths = np.bincount(epochs[:, :2].ravel() * 10 // size, minlength=10)
  assert tenths.max() < 40  # 20 each, four standard errors


def test_batches_go_on_over_the_end_of_an_epoch():
  made = ids(batches(pictures.source(7), 7))
  for epoch in range(4):
    assert sorted(made[7 * epoch : 7 * epoch + 7]) == list(range(7))


def test_a_batch_may_be_larger_than_the_data():
  made = ids(batches(pictures.source(3), 2, batch_size=9))
  assert collections.Counter(made) == {0: 6, 1: 6, 2: 6}
  assert ids(batches(pictures.source(1), 1)) == [0, 0, 0, 0]


def test_to_start_is_to_skip():
  source = pictures.source(7, captions=3)
  all_of_them = batches(source, 6)
  for skipped in (0, 1, 4):
    made = batches(source, 6 - skipped, start=4 * skipped)
    assert_same(made, all_of_them[skipped:])
  far = batches(source, 1, start=4 * 10**9)  # beyond 32 bits, at once
  assert far[0]["image"].shape == (4, 8, 8, 3)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_have_the_rows_of_one(count):
  source = pictures.source(9, captions=3, broken={2: (b"", ["a"])})
  alone = batches(source, 3, batch_size=8, max_bad=1.0)
  rows = np.split(np.arange(8), count)
  parts = [batches(source, 3, batch_size=8, rows=r, max_bad=1.0) for r in rows]
  joined = [
    {key: np.concatenate([part[key] for part in step]) for key in step[0]}
    for step in zip(*parts, strict=True)
  ]
  assert_same(joined, alone)
  # Wherever the devices of a process stand in the mesh.
  for batch, whole in zip(
    batches(source, 3, batch_size=8, rows=rows[0] * 2 + 1, max_bad=1.0),
    alone,
    strict=True,
  ):
    assert_same([batch], [{k: v[rows[0] * 2 + 1] for k, v in whole.items()}])
  # And of the same run on fewer devices, that goes on in the middle.
  assert_same(batches(source, 1, batch_size=8, start=16, max_bad=1.0), alone[2:])


def test_workers_change_nothing():
  source = pictures.source(9, captions=3, broken={2: (b"", ["a"])})
  one = batches(source, 5, workers=1, max_bad=1.0)
  assert_same(batches(source, 5, workers=4, max_bad=1.0), one)
  assert_same(batches(source, 5, max_bad=1.0), one)


def test_batches_are_made_side_by_side_and_come_in_order():
  """The first batch is not ready before the second was begun."""
  source, begun = pictures.source(8), threading.Event()
  order = shuffle.shuffled(np.arange(8), 8, 0)

  class Slow(pictures.Source):
    def read(self, indices):
      if set(indices) == set(order[:4]):
        assert begun.wait(20)
      else:
        begun.set()
      return super().read(indices)

  made = batches(Slow(source.records), 2, words="decode|resize(8)", workers=2)
  assert ids(made) == order.tolist()


def test_seeds_differ_in_order_and_augmentation():
  source = pictures.source(64)
  assert ids(batches(source, 4)) != ids(batches(source, 4, seed=1))
  one = pictures.source(1)
  first, second = (batches(one, 1, seed=seed)[0]["image"] for seed in (0, 1))
  assert (first != second).any()
  # And one example is another picture every time.
  assert len({image.tobytes() for image in first}) == 4


def test_all_captions_of_an_image_are_drawn():
  made = batches(pictures.source(2, captions=5), 20, batch_size=10)
  drawn = collections.Counter(TOKENIZER.decode(row) for b in made for row in b["text"])
  assert set(drawn) == {f"c{k} of {i}" for k in range(5) for i in range(2)}
  assert min(drawn.values()) > 5 and max(drawn.values()) < 38  # 20 each, 4 st. errors


# --- Broken records -------------------------------------------------------------------

JPEG = pictures.encoded(pictures.pixels(), "JPEG")
BROKEN = {
  "truncated image": (JPEG[: len(JPEG) * 9 // 10], ["a"]),
  "empty file": (b"", ["a"]),
  "image too large": (pictures.bomb(), ["a"]),
  "no image": (b"<html>", ["a"]),
  "empty caption": (JPEG, ["  "]),
  "caption is not UTF-8": (JPEG, [b"caf\xe9"]),
}
WHOLE = {
  "PNG under .jpg": pictures.encoded(pictures.pixels(), "PNG"),
  "GIF under .jpg": pictures.encoded(pictures.pixels(), "GIF", "P"),
  "CMYK": pictures.encoded(pictures.pixels(), "JPEG", "CMYK"),
  "grey": pictures.encoded(pictures.pixels(), "JPEG", "L"),
}


def test_broken_records_are_passed_over_counted_and_named(caplog):
  broken = dict(enumerate(BROKEN.values(), 3))
  source = pictures.source(20, broken=broken)
  made = pipeline.train_batches(
    source, PP, TOKENIZER, batch_size=4, seed=0, max_bad=0.9
  )
  with caplog.at_level(logging.WARNING):
    first = list(itertools.islice(made, 5))
  assert set(ids(first)) <= set(range(20)) - set(broken)
  assert len(ids(first)) == 20
  # Each stands once in the epoch; a substitute may be one of them again.
  assert set(made.bad) == set(BROKEN)
  told = caplog.text
  for index, reason in enumerate(BROKEN, 3):
    assert f"pic{index}.jpg: {reason}" in told
  # What replaces them depends on nothing but seed and position.
  assert_same(batches(source, 5, max_bad=0.9, workers=3), first)
  assert ids(batches(source, 5, seed=1, max_bad=0.9)) != ids(first)


def test_the_other_rows_do_not_change():
  whole = batches(pictures.source(12), 3)
  broken = batches(pictures.source(12, broken={5: (b"", ["a"])}), 3, max_bad=1.0)
  for a, b in zip(whole, broken, strict=True):
    same = a["image_id"] != 5
    for key in a:
      np.testing.assert_array_equal(a[key][same], b[key][same])


def test_odd_but_whole_files_are_no_broken_records():
  files = {i: (data, ["a"]) for i, data in enumerate(WHOLE.values())}
  made = pipeline.train_batches(
    pictures.source(4, broken=files), PP, TOKENIZER, batch_size=4, seed=0
  )
  assert sorted(next(made)["image_id"]) == [0, 1, 2, 3]
  assert not made.bad


def test_one_broken_caption_of_several():
  """The image comes with its other captions."""
  source = pictures.source(6, captions=3)
  records = list(source.records)
  records[2] = (records[2][0], ["good", b"\xff", ""])
  made = batches(pictures.Source(tuple(records)), 30, max_bad=0.9)
  texts = {
    TOKENIZER.decode(text)
    for batch in made
    for text in batch["text"][batch["image_id"] == 2]
  }
  assert texts == {"good"}


def test_too_many_broken_records_end_the_run():
  source = pictures.source(40, broken={i: (b"", ["a"]) for i in range(0, 40, 4)})
  made = pipeline.train_batches(
    source, PP, TOKENIZER, batch_size=8, seed=0, max_bad=0.1
  )
  with pytest.raises(records.BadDataError) as caught:
    for _ in range(200):
      next(made)
  told = str(caught.value)
  assert "empty file" in told and "pic" in told and "max_bad=0.1" in told
  assert str(sum(made.bad.values())) in told
  # Within what is allowed the same data are read on.
  assert len(batches(source, 60, batch_size=8, max_bad=0.5)) == 60


def test_no_share_is_taken_of_a_few_unless_none_may_be_broken():
  source = pictures.source(60, broken={0: (b"", ["a"])})
  assert len(batches(source, 15)) == 15  # 1 of 61: more than 0.01
  with pytest.raises(records.BadDataError, match=r"pic0.jpg"):
    batches(source, 15, max_bad=0.0)


def test_nothing_but_broken_records_is_told_at_once():
  source = pictures.source(5, broken={i: (b"", ["a"]) for i in range(5)})
  with pytest.raises(records.BadDataError, match=r"pic\d.jpg: empty file"):
    batches(source, 1)


def test_errors_that_are_no_broken_records_come_as_themselves():
  class Odd(pictures.Source):
    def read(self, indices):
      raise OSError(5, "the disk is gone")

  with pytest.raises(OSError, match="the disk is gone"):
    batches(Odd(pictures.source(3).records), 1)
  other = pictures.encoded(pictures.pixels(5, 9))
  source = pictures.source(3, broken={1: (other, ["a"])})
  with pytest.raises(ValueError, match=r"different sizes.*resize\(64\)"):
    batches(source, 1, words="decode")
  with pytest.raises(ValueError, match="center_crop"):
    batches(source, 1, words="decode|center_crop(16)")


def test_batches_before_an_error_are_given():
  order = shuffle.shuffled(np.arange(12), 12, 0)
  last = set(order[8:].tolist())

  class Odd(pictures.Source):
    def read(self, indices):
      if {int(i) for i in indices} == last:
        raise OSError("the disk is gone")
      return super().read(indices)

  made = pipeline.train_batches(
    Odd(pictures.source(12).records), PP, TOKENIZER, batch_size=4, seed=0, workers=3
  )
  assert ids([next(made), next(made)]) == order[:8].tolist()
  with pytest.raises(OSError, match="the disk is gone"):
    next(made)


def test_mistakes_are_told_before_anything_is_read():
  source = pictures.source(3)

  def make(**fields):
    given = dict(batch_size=4, seed=0) | fields
    return pipeline.train_batches(source, given.pop("pp", PP), TOKENIZER, **given)

  with pytest.raises(ValueError, match=r"rows=\[3, 4\]: want some of 0 … 3"):
    make(rows=np.array([3, 4]))
  with pytest.raises(ValueError, match="no word 'decod'.*'decode'"):
    make(pp="decod|resize(8)")
  with pytest.raises(ValueError, match="seed=-1"):
    make(seed=-1)
  with pytest.raises(ValueError, match=r"data\.block=2 does not divide the 3 examples"):
    make(block=2)


def test_batches_dropped_while_more_are_prepared():
  """TensorFlow would wait, with Python's lock, for a thread that wants the lock."""
  script = """
    import time
    from tests.data import pictures
    from vlp_jax.data import pipeline
    class Slow(pictures.Tokenizer):
      def encode(self, captions):
        time.sleep(0.02)
        return super().encode(captions)
    for i in range(8):
      made = pipeline.train_batches(
          pictures.source(10), "decode|resize(8)", Slow(), batch_size=4, seed=i)
      made.open()
      next(made)
      if i % 2:
        made.close()
        assert not list(made)
    """
  root = str(pathlib.Path(__file__).parents[2])
  subprocess.run(
    [sys.executable, "-c", textwrap.dedent(script)],
    env={**os.environ, "PYTHONPATH": root, "TF_CPP_MIN_LOG_LEVEL": "3"},
    check=True,
    timeout=60,
  )


# --- Evaluation -----------------------------------------------------------------------

EVAL = "decode|resize(8)"


def test_images_in_order_and_the_last_batch_filled_up():
  source = pictures.source(7)
  made = list(evaluation.eval_images(source, EVAL, batch_size=3))
  assert [batch["valid"].tolist() for batch in made] == [
    [True] * 3, [True] * 3, [True, False, False]
  ]  # fmt: skip
  for batch in made:
    assert batch["image"].shape == (3, 8, 8, 3) and batch["image"].dtype == np.uint8
    assert batch["image_id"].dtype == batch["example_index"].dtype == np.int32
  valid = np.concatenate([batch["valid"] for batch in made])
  index = np.concatenate([batch["example_index"] for batch in made])
  assert index[valid].tolist() == list(range(7))
  images = np.concatenate([batch["image"] for batch in made])[valid]
  op = pp.parse(EVAL)
  for image, raw in zip(images, source.read(range(7)), strict=True):
    want = op({"image": raw["image"], "caption": ""}, None)["image"]
    np.testing.assert_array_equal(image, want)


def test_texts_are_all_captions_of_each_image_in_turn():
  source = pictures.source(5, captions=3)
  made = list(evaluation.eval_texts(source, EVAL, TOKENIZER, batch_size=4))
  assert len(made) == 4
  valid = np.concatenate([batch["valid"] for batch in made])
  assert valid.sum() == 15
  captions = np.array([c for batch in made for c in batch["caption"]])
  want = [f"c{k} of {i}" for i in range(5) for k in range(3)]
  assert captions[valid].tolist() == want
  image_id = np.concatenate([batch["image_id"] for batch in made])
  assert image_id[valid].tolist() == np.repeat(np.arange(5), 3).tolist()
  texts = [TOKENIZER.decode(row) for batch in made for row in batch["text"]]
  assert np.array(texts)[valid].tolist() == want


def test_texts_are_cleaned_as_in_training():
  source = pictures.Source(((JPEG, ["A DOG, a cat.", b"two"]),))
  (batch,) = evaluation.eval_texts(source, EVAL + "|clean(2)", TOKENIZER, batch_size=2)
  assert [TOKENIZER.decode(row) for row in batch["text"]] == ["a dog", "two"]


def test_pairs_have_the_first_caption():
  source = pictures.source(5, captions=3)
  made = list(evaluation.eval_pairs(source, EVAL, TOKENIZER, batch_size=4))
  assert [len(batch["caption"]) for batch in made] == [4, 4]
  assert made[1]["valid"].tolist() == [True, False, False, False]
  assert made[0]["caption"] == [f"c0 of {i}" for i in range(4)]
  images = list(evaluation.eval_images(source, EVAL, batch_size=4))
  for pair, image in zip(made, images, strict=True):
    for key, value in image.items():
      np.testing.assert_array_equal(pair[key], value)
    assert [TOKENIZER.decode(t) for t in pair["text"]] == pair["caption"]


@pytest.mark.parametrize("reason", BROKEN)
def test_evaluation_leaves_nothing_out(reason):
  source = pictures.source(5, broken={3: BROKEN[reason]})
  made = [evaluation.eval_pairs(source, EVAL, TOKENIZER, batch_size=2)]
  if "caption" in reason:
    made += [evaluation.eval_texts(source, EVAL, TOKENIZER, batch_size=2)]
  else:
    made += [evaluation.eval_images(source, EVAL, batch_size=2)]
  for iterator in made:
    with pytest.raises(ValueError, match=f"evaluation: pic3.jpg.*{reason}"):
      list(iterator)


def test_an_image_without_captions_is_broken():
  source = pictures.source(3, broken={1: (JPEG, [])})
  with pytest.raises(ValueError, match="evaluation: pic1.jpg.*caption"):
    list(evaluation.eval_texts(source, EVAL, TOKENIZER, batch_size=2))
  assert 1 not in ids(batches(source, 3, max_bad=1.0))


# --- Without JAX ----------------------------------------------------------------------


def test_data_need_no_jax(tmp_path):
  """Processes that only read data do not load it, and it cannot be asked for keys."""
  (tmp_path / "pairs.jsonl").write_text('{"image": "a.png", "caption": "A dog."}\n')
  (tmp_path / "a.png").write_bytes(pictures.encoded(pictures.pixels()))
  (tmp_path / "vocab.txt").write_text(
    "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "."])
  )
  script = """
    import sys
    for name in ("jax", "jaxlib", "flax"):
      sys.modules[name] = None
    from vlp_jax.data import pipeline
    from vlp_jax.data.sources import scenes, table, tfds
    from vlp_jax.data.tokenizers import sentencepiece, wordpiece
    from vlp_jax.data.builders import flickr8k
    source = table.Source(sys.argv[1] + "/pairs.jsonl")
    tokenizer = wordpiece.Tokenizer(sys.argv[1] + "/vocab.txt", length=6)
    for data in (source, scenes.Source(size=4, res=32)):
      batch = next(pipeline.train_batches(
          data, "decode|random_resized_crop(8)", tokenizer, batch_size=2, seed=0))
      assert batch["image"].shape == (2, 8, 8, 3), batch["image"].shape
    tfds.Source("scenes", split="val", data_dir=sys.argv[1] + "/tfds",
                builder=dict(train_size=4, val_size=4, test_size=4, res=32)).read([0])
    """
  root = str(pathlib.Path(__file__).parents[2])
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
    env={**os.environ, "PYTHONPATH": root, "TF_CPP_MIN_LOG_LEVEL": "3"},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr[-2000:]
