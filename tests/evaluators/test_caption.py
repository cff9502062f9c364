"""Captions by a model that knows what it sees, or not."""

import json

import flax.linen as nn
import jax.numpy as jnp
import pytest

from tests.evaluators import fakes
from vlp_jax import report
from vlp_jax.evaluators import caption

SHADES = (10, 40, 80, 90, 100)
FIRST = len(fakes.Tokenizer.words)
WORD = fakes.Tokenizer.words.index


class Writer(nn.Module):
  """Writes "shade s40" of an image of that shade, behind what it begins with."""

  off: int = 0

  def generate(self, model, image, start, settings):
    shade = jnp.round(image.x[:, 0, 0]).astype(jnp.int32) + FIRST + self.off
    column = lambda name: jnp.full_like(shade, WORD(name))
    words = [column("s"), shade, column("[SEP]"), column("x")]
    if start.shape[1] == 1:
      words.insert(0, column("shade"))
    ids = jnp.concatenate([start, jnp.stack(words, axis=1)], axis=1)
    assert ids.shape[1] <= settings.max_length
    return jnp.pad(ids, ((0, 0), (0, settings.max_length - ids.shape[1])))


def evaluator(source=None, batch_size=2, file=None, off=0, objective=None, **fields):
  made = caption.Evaluator(**fields)
  made.setup(
    pretrainer=fakes.pretrainer(lm=objective or Writer(off)),
    source=source or fakes.Source(SHADES),
    tokenizer=fakes.Tokenizer(),
    pp=fakes.PP,
    mesh=None,
    batch_size=batch_size,
    file=file,
  )
  return made


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_a_right_caption_has_all_points(tmp_path, batch_size):
  file = tmp_path / "predictions" / "coco.json"
  got = evaluator(batch_size=batch_size, file=file)(fakes.variables())
  for name in ("bleu_1", "bleu_2", "rouge_l"):
    assert got[name] == pytest.approx(100.0, abs=1e-4)
  # Of texts of two words there are pairs and no longer runs: half of all orders.
  assert got["cider"] == pytest.approx(500.0)
  rows = json.loads(file.read_text())
  assert rows == [
    {"image_id": i, "caption": f"shade s{shade}"} for i, shade in enumerate(SHADES)
  ]


def test_a_wrong_word_costs_points():
  got = evaluator(off=1)(fakes.variables())
  assert got["bleu_1"] == pytest.approx(50.0, abs=1e-4)
  assert got["rouge_l"] == pytest.approx(50.0) and got["cider"] == 0.0


def test_all_captions_of_an_image_are_its_references():
  """Five examples of three images, with two captions each; an image is written once."""
  source = fakes.Source((10, 10, 40, 40, 80), captions=2, ids=(7, 7, 8, 8, 9))
  made = evaluator(source)
  assert len(made._captions(fakes.variables())) == 3
  assert made(fakes.variables())["bleu_1"] == pytest.approx(100.0, abs=1e-4)


def test_the_prompt_is_no_part_of_the_caption():
  made = evaluator(prompt="shade ")
  assert made._begin == [2, WORD("shade")]
  assert list(made._captions(fakes.variables()).values())[1] == "s40"


def test_official_numbers_of_images():
  class Files:
    def read(self, indices):
      names = ("val2014/COCO_val2014_000000391895.jpg", "red bus.png")
      return [{"key": names[i]} for i in indices]

  assert caption.official_ids(Files(), [1, 0]) == ["red bus", 391895]


def test_what_cannot_be_is_told():
  with pytest.raises(ValueError, match="objective='lm' writes no text; the run has lm"):
    evaluator(objective=fakes.Itm())
  made = caption.Evaluator(objective="nope")
  rest = dict(source=None, tokenizer=None, pp="", mesh=None, batch_size=2)
  with pytest.raises(ValueError, match="objective='nope' writes no text"):
    made.setup(pretrainer=fakes.pretrainer(), **rest)
  with pytest.raises(ValueError, match="max_length=2 leaves nothing to write behind"):
    evaluator(prompt="shade", max_length=2)


def test_the_table():
  values = evaluator()(fakes.variables())
  text = report.table({"coco": values})
  assert "BLEU-4  ROUGE-L  CIDEr" in text and "500.0" in text
