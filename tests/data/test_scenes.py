"""Rendered scenes: what the caption says is what the picture shows, and only that."""

import collections
import functools
import io

import numpy as np
from PIL import Image
import pytest

from vlp_jax.data import drawing
from vlp_jax.data import scenes
from vlp_jax.data.sources import scenes as source_lib


def test_every_number_is_another_scene():
  described = [scenes.scene(number) for number in range(scenes.COUNT)]
  # "A left of B" and "B right of A" are one scene; so are they as sets of things.
  shown = {(frozenset(enumerate(s.things)), s.where) for s in described}
  assert len(shown) == len(described) == 864 + 96 * 95 * 2
  assert all(len(set(s.things)) == len(s.things) for s in described)
  for wrong in (-1, scenes.COUNT):
    with pytest.raises(ValueError, match="scene"):
      scenes.scene(wrong)


def test_a_number_is_found_again():
  for number in (0, 8, 9, 863, 864, 865, 1_000, 9_999, scenes.COUNT - 1):
    assert scenes.number_of(scenes.scene(number)) == number


def test_a_caption_determines_its_scene():
  said = collections.defaultdict(set)
  for number in range(0, scenes.COUNT, 3):
    for caption in scenes.captions(scenes.scene(number)):
      said[caption].add(number)
  assert all(len(numbers) == 1 for numbers in said.values())


def test_words_are_those_that_depend_on_the_picture():
  caption = "there is a small red circle to the left of a large blue square"
  assert scenes.words(caption) == "small red circle left large blue square".split()
  assert scenes.words("in the bottom right there is a small pink ring") == (
    "bottom right small pink ring".split()
  )
  assert len(scenes.attribute_words()) == 2 + 8 + 6 + 4 + 3
  every = {
    word
    for number in range(0, scenes.COUNT, 7)
    for caption in scenes.captions(scenes.scene(number))
    for word in caption.split()
  }
  rest = every - scenes.attribute_words()
  assert rest == set("a there is in at on the to of with its it placed".split())


def test_splits_share_no_description():
  parts = {name: scenes.split(name) for name in scenes.SPLITS}
  for name in ("val", "test"):
    assert parts[name].dtype == np.int32
    assert len(parts[name]) == len(set(parts[name].tolist())) == 500
    assert (parts[name] < scenes.ONE_COUNT).sum() == 100
  every = np.concatenate(list(parts.values()))
  assert sorted(every.tolist()) == list(range(scenes.COUNT))


def test_twins_say_the_same_words_of_another_scene():
  def families(twins):
    numbers = scenes.split("val", twins=twins)
    bags = (scenes.bag(scenes.scene(n)) for n in numbers if n >= scenes.ONE_COUNT)
    return collections.Counter(collections.Counter(bags).values())

  assert families(0.5) == {1: 200, 2: 100}
  assert families(0.0) == {1: 400}
  assert families(1.0) == {2: 200}


@pytest.mark.parametrize("number", [3, 900, 5_000, scenes.COUNT - 1])
def test_rivals_bind_the_same_words_otherwise(number):
  described = scenes.scene(number)
  found = scenes.rivals(number)
  if number < scenes.ONE_COUNT:
    assert {scenes.scene(n).things for n in found} == {described.things}
    assert len(found) == len(scenes.PLACES) - 1
  else:
    # All that a slow search finds, the same two in the other order among them.
    same = [n for n in range(scenes.COUNT) if _bag(n) == _bag(number)]
    assert found == [n for n in same if n != number]
    turned = scenes.Scene(described.things[::-1], described.where)
    assert scenes.number_of(turned) in found


@functools.cache
def _bag(number):
  return scenes.bag(scenes.scene(number))


# --- Pictures -------------------------------------------------------------------------


def named_colour(pixel):
  """The colour's name nearest to an RGB pixel."""
  colours = {
    name: np.array(Image.new("HSV", (1, 1), _hsv(name)).convert("RGB"))[0, 0]
    for name in scenes.COLOURS
  }
  return min(colours, key=lambda n: np.abs(colours[n] - pixel.astype(float)).sum())


def _hsv(name):
  hue, saturation, value = scenes.COLOURS[name]
  return round(hue / 360 * 255), round(saturation * 255), round(value * 255)


def blobs(image, count):
  """(x, y, extent, colour name) of `count` separate things, by flood fill."""
  ground = image.min(axis=2) > 165
  saturated = image.max(axis=2).astype(int) - image.min(axis=2) > 70
  figure = ~ground | saturated
  found = []
  left = {tuple(at) for at in np.argwhere(figure)}
  while left:
    edge = [left.pop()]
    blob = list(edge)
    while edge:
      y, x = edge.pop()
      for step in ((0, 1), (1, 0), (0, -1), (-1, 0)):
        near = (y + step[0], x + step[1])
        if near in left:
          left.remove(near)
          edge.append(near)
          blob.append(near)
    if len(blob) > 3:
      ys, xs = np.array(blob).T
      pixels = image[ys, xs]
      extent = max(np.ptp(ys), np.ptp(xs)) + 1
      found.append((xs.mean(), ys.mean(), extent, np.median(pixels, axis=0)))
  assert len(found) == count, "things touch, or fall apart"
  return found


@pytest.mark.parametrize("res", [32, 48, 64])
def test_the_picture_shows_what_is_said(res):
  rng = np.random.default_rng(0)
  for number in scenes.split("val")[:60].tolist():
    described = scenes.scene(number)
    image = drawing.draw(described, res=res, rng=rng)
    assert image.shape == (res, res, 3) and image.dtype == np.uint8
    found = blobs(image, len(described.things))
    if len(found) == 1:
      place = scenes.PLACES[described.where]
      ((x, y, *_),) = found
      assert abs(x / res - place[0]) < 0.08 and abs(y / res - place[1]) < 0.08
    else:
      axis = 0 if described.where == "left" else 1
      found.sort(key=lambda blob: blob[axis])
      distance = np.subtract(found[1][:2], found[0][:2])
      assert distance[axis] > 2 * abs(distance[1 - axis]) and distance[axis] > res / 4
    for thing, (_, _, extent, colour) in zip(described.things, found, strict=True):
      assert named_colour(colour) == thing.colour
      assert (extent > res / 3) == (thing.size == "large")


def test_shapes_differ_at_their_smallest():
  for res in (32, 64):
    small = max(5, round(res * scenes.DIAMETERS["small"][0]))
    masks = [drawing.shape_mask(shape, small) for shape in scenes.SHAPES]
    for i, one in enumerate(masks):
      assert one.shape == (small, small, 1) and one.min() >= 0 and one.max() == 1
      for other in masks[:i]:
        assert np.abs(one - other).mean() > 0.12


def test_pictures_of_one_description_differ():
  rng = np.random.default_rng(0)
  described = scenes.scene(scenes.COUNT - 1)
  one, two = (drawing.draw(described, res=48, rng=rng) for _ in range(2))
  assert (one != two).mean() > 0.5


# --- Source ---------------------------------------------------------------------------


def test_source_is_a_function_of_seed_and_index():
  source = source_lib.Source(size=1000, res=32)
  again = source_lib.Source(size=1000, res=32)
  assert source.read([7, 3]) == [*again.read([7]), *again.read([3])]
  assert source.read([7]) != source_lib.Source(size=1000, res=32, seed=1).read([7])
  # A longer data set begins with a shorter one.
  assert source.read([7]) == source_lib.Source(res=32).read([7])
  texts = source.captions(range(50))
  assert texts == [example["captions"][0] for example in source.read(range(50))]
  assert len(set(texts)) > 45


def test_source_examples():
  source = source_lib.Source("val", res=40)
  assert len(source) == 500
  examples = source.read(np.arange(500))
  for example in examples[:5]:
    image = Image.open(io.BytesIO(example["image"]))
    assert image.format == "PNG" and image.size == (40, 40) and image.mode == "RGB"
    assert example["words"] == scenes.words(example["captions"][0])
  assert examples[3]["key"] == "scenes/val/3"
  assert len({example["captions"][0] for example in examples}) == 500
  assert len({example["image_id"] for example in examples}) == 500
  trained = {
    e["image_id"] for e in source_lib.Source(size=800, res=24).read(range(800))
  }
  assert not trained & {example["image_id"] for example in examples}


def test_share_of_scenes_with_one_thing():
  source = source_lib.Source(size=500, res=24, one=0.3)
  single = [e["image_id"] < scenes.ONE_COUNT for e in source.read(range(500))]
  assert 0.24 < np.mean(single) < 0.36


def test_rivals_stand_side_by_side():
  fields = dict(size=2_000, res=24)
  alone = [scenes.scene(n) for n in _numbers(source_lib.Source(**fields))]
  beside = [scenes.scene(n) for n in _numbers(source_lib.Source(**fields, rivalry=0.5))]
  assert beside[::2] == alone[::2]
  held_out = {*scenes.split("val").tolist(), *scenes.split("test").tolist()}
  met = 0
  for first, second in zip(beside[::2], beside[1::2], strict=True):
    number, other = scenes.number_of(first), scenes.number_of(second)
    assert other not in held_out
    met += other in scenes.rivals(number)
  assert 430 < met < 570  # of 1,000, with a few left without rivals


def _numbers(source):
  return [source._example(index).number for index in range(len(source))]


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(split="dev"), 'split="dev"'),
    (dict(split="val", size=501), "size=501"),
    (dict(size=0), "size=0"),
    (dict(res=16), "res=16"),
    (dict(seed=-1), "seed=-1"),
    (dict(one=0.9), "one=0.9"),
    (dict(one=1.5), "one=1.5"),
    (dict(twins=-0.1), "twins=-0.1"),
    (dict(rivalry=2), "rivalry=2"),
  ],
)
def test_source_says_what_is_wrong(fields, message):
  with pytest.raises(ValueError, match=message):
    source_lib.Source(**fields)


def test_read_beyond_the_end():
  with pytest.raises(IndexError, match="scene 10 of train"):
    source_lib.Source(size=10).read([10])
