"""Mixtures: shares, whole epochs, ids, and mistakes."""

import collections

import numpy as np
import pytest

from vlp_jax.data.sources import mixture

SMALL = dict(type="scenes", split="val", size=5, res=24)
LARGE = dict(type="scenes", split="train", size=30, res=24)


def keys(source):
  return [example["key"] for example in source.read(np.arange(len(source)))]


def test_without_weights_it_is_one_after_the_other():
  source = mixture.Source(dict(a=SMALL, b=LARGE))
  assert len(source) == 35
  want = [f"scenes/val/{i}" for i in range(5)] + [
    f"scenes/train/{i}" for i in range(30)
  ]
  assert keys(source) == want
  # In any order, and with repetition.
  order = np.array([34, 0, 7, 4, 5, 0])
  assert [e["key"] for e in source.read(order)] == [want[i] for i in order]


def test_weights_are_shares_of_an_epoch_that_shows_everything():
  source = mixture.Source(dict(a=SMALL, b=LARGE), dict(a=1, b=3))
  counts = collections.Counter(keys(source))
  assert len(counts) == 35
  assert len(source) == 40
  assert {counts[f"scenes/val/{i}"] for i in range(5)} == {2}
  assert {counts[f"scenes/train/{i}"] for i in range(30)} == {1}
  # The small one has the larger share.
  source = mixture.Source(dict(a=SMALL, b=LARGE), dict(a=0.9, b=0.1))
  assert len(source) == 300


def test_images_of_two_parts_are_never_the_same_image():
  # The same scenes twice: as data sets of their own they have the same ids.
  source = mixture.Source(dict(a=SMALL, b=SMALL))
  ids = [example["image_id"] for example in source.read(np.arange(10))]
  assert len(set(ids)) == 10


def test_captions_are_of_the_parts():
  source = mixture.Source(dict(a=SMALL, b=LARGE))
  indices = np.array([0, 34, 3])
  want = [c for e in source.read(indices) for c in e["captions"]]
  assert sorted(source.captions(indices)) == sorted(want)


@pytest.mark.parametrize(
  "fields, said",
  [
    (dict(parts={}), "source.parts is empty"),
    (dict(parts=dict(a="scenes")), r"source.parts.a: want dict\(type=…"),
    (dict(parts=dict(a=dict(type="scene"))), "a.type='scene': there are .*scenes"),
    (dict(parts=dict(a=dict(type="nowhere:Source"))), "No module named 'nowhere'"),
    (dict(parts=dict(a=SMALL | dict(ress=3))), "parts.a.ress: no such field of scenes"),
    (dict(parts=dict(a=dict(type="table"))), "source.parts.a: .*'path'"),
    (dict(parts=dict(a=SMALL), weights=dict(b=1)), "weights is of b, .*parts has a"),
    (dict(parts=dict(a=SMALL), weights=dict(a=0)), "weights.a=0: want a number above"),
  ],
)
def test_mistakes(fields, said):
  with pytest.raises(ValueError, match=said):
    mixture.Source(**fields)
