"""Examples of tasks: tables with classes, two images, answers, and their batches."""

import json
import pathlib

import numpy as np
import pytest

from tests.data import pictures
from vlp_jax.data import columns as columns_lib
from vlp_jax.data import evaluation
from vlp_jax.data import pipeline
from vlp_jax.data import records
from vlp_jax.data.sources import task
from vlp_jax.data.tokenizers import wordpiece
from vlp_jax.objectives import classify
from vlp_jax.objectives import pair_classify
from vlp_jax.objectives import vqa

PP = "decode|resize(8)"
VOCAB = pathlib.Path(__file__).parents[1] / "reference" / "tokenizers"
TOKENIZER = wordpiece.Tokenizer(str(VOCAB / "albef_vocab.txt"), length=8, sep=False)
ENTAILED = [
  dict(image="a", sentence="a dog", label="entailment"),
  dict(image="b", sentence="a cat", label="neutral"),
  dict(image="a", sentence="two dogs", label="contradiction"),
]
CLASSES = ("contradiction", "neutral", "entailment")


@pytest.fixture
def folder(tmp_path):
  for seed, name in enumerate(("a", "b", "c")):
    png = pictures.encoded(pictures.pixels(seed=seed))
    (tmp_path / f"{name}.png").write_bytes(png)
  return tmp_path


def table(folder, rows, suffix=".json"):
  text = json.dumps(rows)
  if suffix == ".jsonl":
    text = "\n".join(json.dumps(row) for row in rows)
  path = folder / f"rows{suffix}"
  path.write_text(text)
  return str(path)


def batch(source, objective, size):
  wanted = columns_lib.of({"it": objective}, res=8)
  kinds = dict(batch_size=size, columns=wanted)
  train = pipeline.train_batches(source, PP, TOKENIZER, seed=0, **kinds)
  (pairs,) = evaluation.eval_pairs(source, PP, TOKENIZER, **kinds)
  first = next(iter(train))
  for name, (shape, dtype) in wanted.specs.items():
    assert first[name].shape == (size, *shape) and first[name].dtype == dtype
    assert pairs[name].shape == (size, *shape) and pairs[name].dtype == dtype
  return first, pairs


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_classes(folder, suffix):
  path = table(folder, ENTAILED, suffix)
  source = task.Source(path, suffix=".png", classes=CLASSES)
  train, pairs = batch(source, classify.Objective(width=4, classes=3), 3)
  assert pairs["label"].tolist() == [2, 1, 0]
  assert pairs["image_id"].tolist() == [0, 1, 0]
  assert (
    pairs["caption"]
    == source.captions(np.arange(3))
    == [
      "a dog",
      "a cat",
      "two dogs",
    ]
  )
  # What belongs to an example stays with it when the order is another.
  for text, label in zip(train["text"], train["label"], strict=True):
    (row,) = np.flatnonzero((pairs["text"] == text).all(axis=1))
    assert pairs["label"][row] == label


def test_two_images(folder):
  rows = [
    dict(images=["a.png", "b.png"], sentence="left", label=1),
    dict(images=["c.png", "a.png"], sentence="right", label=0),
  ]
  source = task.Source(table(folder, rows))
  objective = classify.Objective(width=4, classes=2, images=2)
  train, pairs = batch(source, objective, 2)
  np.testing.assert_array_equal(pairs["image"][0], pairs["image2"][1])
  assert (pairs["image"][0] != pairs["image2"][0]).any()
  assert sorted(train["label"].tolist()) == [0, 1]


def test_two_images_that_change_places(folder):
  """With their sizes and the words for their sides, in training alone."""
  for seed, name in enumerate(("wide", "tall")):
    picture = pictures.pixels(*((24, 12), (12, 24))[seed], seed=seed + 5)
    (folder / f"{name}.png").write_bytes(pictures.encoded(picture))
  rows = [dict(images=["wide.png", "tall.png"], sentence="a dog left", label=1)]
  source = task.Source(table(folder, rows))
  columns = columns_lib.of({"task": pair_classify.Objective(4)}, res=8)

  def batch(pp):
    common = dict(batch_size=1, seed=0, columns=columns)
    return next(pipeline.train_batches(source, pp, TOKENIZER, **common))

  plain, swapped = (batch(f"decode|fit(8, 8, 4)|swap_sides({p})") for p in (0.0, 1.0))
  assert (plain["image_size"] != plain["image2_size"]).any()
  for name in ("image", "image_size"):
    second = name.replace("image", "image2")
    np.testing.assert_array_equal(plain[name], swapped[second])
    np.testing.assert_array_equal(plain[second], swapped[name])
  (left,), (right,) = (
    TOKENIZER.encode(["a dog left"])[0],
    TOKENIZER.encode(["a dog right"])[0],
  )
  np.testing.assert_array_equal(plain["text"][0], left)
  np.testing.assert_array_equal(swapped["text"][0], right)
  assert swapped["label"].tolist() == [1]
  one = columns_lib.of({"task": classify.Objective(width=4, classes=2)}, res=8)
  with pytest.raises(ValueError, match=r"data\.pp.*swap_sides wants two images"):
    pipeline.train_batches(
      source, f"{PP}|swap_sides", TOKENIZER, batch_size=1, seed=0, columns=one
    )
  with pytest.raises(ValueError, match="evaluation: .*swap_sides is for training"):
    evaluation.eval_pairs(
      source, f"{PP}|swap_sides", TOKENIZER, batch_size=1, columns=columns
    )


def test_answers_with_their_weights(folder):
  rows = [
    dict(image="a.png", question="how many", answer=["two", "two", "three big ones"]),
    dict(image="b.png", question="what", answer="dog"),
    dict(image="b.png", question="who", answers=dict(x=0.25, y=0.5, z=0.75)),
  ]
  source = task.Source(table(folder, rows), answer_weight=0.5)
  objective = vqa.Objective(vocab=TOKENIZER.vocab, width=4, answers=2, length=3)
  _, pairs = batch(source, objective, 3)
  np.testing.assert_allclose(
    pairs["answer_weight"], [[2 / 3, 1 / 3], [0.5, 0], [0.75, 0.5]], rtol=1e-6
  )
  vocab = TOKENIZER.vocab
  for ids, mask in zip(
    pairs["answer"].reshape(-1, 3), pairs["answer_mask"].reshape(-1, 3), strict=True
  ):
    assert (ids[~mask] == vocab.pad).all()
    if mask.any():
      assert ids[0] == vocab.cls and ids[mask][-1] == vocab.sep
  assert pairs["answer_mask"].sum(axis=2).tolist()[1] == [3, 0]


@pytest.mark.parametrize(
  "rows, fields, message",
  [
    ([dict(sentence="x")], {}, 'row 1: wants "image"'),
    ([dict(image="a")], {}, "and one of caption, sentence, question"),
    ([dict(image="a", caption="x", label="no")], dict(classes=("yes",)), "label='no'"),
    ([dict(image="a", caption="x", label="no")], {}, "an int where there are none"),
    ([dict(image="a", caption="x", answers=[1])], {}, '"answers" wants a text'),
    ([dict(image="a", caption="x", answers=dict(a=-1))], {}, '"answers" wants'),
    ([], {}, "is empty"),
    (["x"], {}, "row 1: wants fields"),
  ],
)
def test_tables_that_are_wrong(folder, rows, fields, message):
  with pytest.raises(ValueError) as error:
    task.Source(table(folder, rows), **fields)
  assert message in str(error.value)


def test_what_examples_lack_is_told(folder):
  rows = [dict(image="a.png", caption=f"dog {i}") for i in range(3)]
  source = task.Source(table(folder, rows))
  wanted = columns_lib.Columns({"label": ((), "int32")})
  with pytest.raises(ValueError, match="no label"):
    list(evaluation.eval_pairs(source, PP, TOKENIZER, batch_size=3, columns=wanted))
  with pytest.raises(records.BadDataError, match="no label"):
    next(
      pipeline.train_batches(
        source, PP, TOKENIZER, batch_size=3, seed=0, columns=wanted
      )
    )
  with pytest.raises(ValueError, match="no column 'depth' can be made"):
    columns_lib.Columns({"depth": ((), "int32")})
  with pytest.raises(FileNotFoundError, match="no such table"):
    task.Source(str(folder / "none.json"))


def test_missing_images_are_broken_records(folder):
  rows = [dict(image="gone.png", caption="dog", label=1)]
  (raw,) = task.Source(table(folder, rows)).read(np.arange(1))
  assert raw["error"] == "file is missing" and raw["key"].endswith("gone.png")
