"""Accuracy with a classifier whose answers are known."""

import dataclasses
import json

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from tests.data import pictures
from tests.evaluators import fakes
from vlp_jax.data.sources import task
from vlp_jax.evaluators import classify


class Bright(nn.Module):
  """Class 1 where the image, less the second if there is one, is bright."""

  two: bool = False

  def columns(self, res):
    more = {"image2": ((res, res, 3), "uint8")} if self.two else {}
    return more | {"label": ((), "int32")}

  def predict(self, model, image, text, image2=None):
    bright = image.x.mean(axis=(1, 2))
    if image2 is not None:
      bright = bright - image2.astype(jnp.float32).mean(axis=(1, 2, 3)) / 255.0 + 0.5
    return jnp.stack([jnp.full_like(bright, 0.5), bright], axis=1)


@dataclasses.dataclass(frozen=True)
class Image:
  res: int = fakes.RES


class Model(nn.Module):
  image: Image = Image()

  def encode_image(self, image):
    x = image.astype(jnp.float32).reshape(len(image), 1, -1) / 255.0
    return fakes.Tokens(x)

  def words(self, ids, mask):
    return fakes.Tokens(ids[..., None].astype(jnp.float32), mask)


class Pretrainer(nn.Module):
  model: nn.Module
  objectives: dict


def source(folder, rows):
  for shade in {shade for shades, _ in rows for shade in shades}:
    pixels = np.full((8, 8, 3), shade, np.uint8)
    (folder / f"{shade}.png").write_bytes(pictures.encoded(pixels))
  table = [
    dict(images=[f"{s}.png" for s in shades], caption="x", label=label)
    for shades, label in rows
  ]
  (folder / "rows.json").write_text(json.dumps(table))
  return task.Source(str(folder / "rows.json"))


def evaluate(folder, rows, batch_size, **fields):
  made = classify.Evaluator()
  made.setup(
    pretrainer=Pretrainer(Model(), {"classify": Bright(**fields)}),
    source=source(folder, rows),
    tokenizer=fakes.Tokenizer(),
    pp=fakes.PP,
    mesh=None,
    batch_size=batch_size,
  )
  return made({})


ROWS = [((250,), 1), ((10,), 0), ((200,), 0), ((30,), 1), ((220,), 1)]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_every_example_counts_once(tmp_path, batch_size):
  got = evaluate(tmp_path, ROWS, batch_size)
  want = dict(accuracy=60.0, accuracy_0=50.0, accuracy_1=200 / 3)
  assert got == pytest.approx(want)


def test_two_images(tmp_path):
  rows = [((250, 10), 1), ((10, 250), 0), ((200, 20), 1)]
  assert evaluate(tmp_path, rows, 2, two=True)["accuracy"] == 100.0


def test_an_objective_that_there_is_not(tmp_path):
  made = classify.Evaluator(objective="ve")
  with pytest.raises(ValueError, match="objective='ve': the run has classify"):
    made.setup(
      pretrainer=Pretrainer(Model(), {"classify": Bright()}),
      source=None,
      tokenizer=None,
      pp="",
      mesh=None,
      batch_size=2,
    )
