"""Answers of models that know them, found in each of the ways."""

import dataclasses
import json

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from tests.data import pictures
from tests.evaluators import fakes
from vlp_jax import report
from vlp_jax.data.sources import task
from vlp_jax.evaluators import vqa

WORDS = ("s10", "s40", "x")


@dataclasses.dataclass(frozen=True)
class Image:
  res: int = fakes.RES


class Model(fakes.Model):
  image: Image = Image()

  def fuse(self, image, text):
    return image


class Answers(nn.Module):
  """Of an image of shade s10, s40 or another: the first, second or last answer."""

  classes: int = 3

  def which(self, image):
    shade = image.x[:, 0, 0]
    return jnp.where(shade < 20, 0, jnp.where(shade < 60, 1, 2))

  def predict(self, model, image, text):
    return jnp.eye(self.classes)[self.which(image)]

  def rank(self, model, question, ids, mask, *, most):
    assert ids.shape == (3, 4) and most == 2  # [CLS] s +10 [SEP]
    assert mask.sum(1).tolist() == [4, 4, 3]
    best = self.which(question)[:, None]
    return jnp.concatenate([best, best], axis=1), None

  def generate(self, model, question, settings):
    table = jnp.asarray([[2, 7, 18, 3, 0], [2, 7, 48, 3, 6], [2, 6, 3, 6, 6]])
    return table[self.which(question)]


class Pretrainer(nn.Module):
  model: nn.Module
  objectives: dict


PEOPLE = {
  10: ["s10"] * 10,
  40: ["S40."] * 4 + ["x"] * 6,
  90: ["x"] * 2 + [f"s{i}" for i in range(8)],
  91: None,
}


def source(folder):
  rows = []
  for number, (shade, given) in enumerate(PEOPLE.items()):
    pixels = np.full((8, 8, 3), shade, np.uint8)
    (folder / f"{shade}.png").write_bytes(pictures.encoded(pixels))
    row = dict(image=f"{shade}.png", question="shade", question_id=70 + number)
    row["answer_type"] = "other" if number else "yes/no"
    rows.append(row | ({"answer": given} if given else {}))
  (folder / "rows.json").write_text(json.dumps(rows))
  (folder / "answers.json").write_text(json.dumps(WORDS))
  return task.Source(str(folder / "rows.json"))


def evaluator(folder, batch_size=3, objective=None, found=None, **fields):
  made = vqa.Evaluator(**fields)
  made.setup(
    pretrainer=Pretrainer(Model(), {"vqa": objective or Answers()}),
    source=found or source(folder),
    tokenizer=fakes.Tokenizer(),
    pp=fakes.PP,
    mesh=None,
    batch_size=batch_size,
    file=folder / "predictions" / "test.json",
  )
  return made


@pytest.mark.parametrize(
  "how, batch_size",
  [("rank", 3), ("generate", 3), ("choose", 1), ("choose", 3), ("choose", 4)],
)
def test_accuracy_and_file(tmp_path, how, batch_size):
  listed = {} if how == "generate" else dict(answers=str(tmp_path / "answers.json"))
  found = source(tmp_path)
  got = evaluator(tmp_path, batch_size, found=found, how=how, rank=2, **listed)(
    fakes.variables()
  )
  # "x" of ten: two say so, who see one other, 1/3; the others see two, 2/3.
  third = (2 / 3 + 8 * 2 / 3) / 10
  assert got == pytest.approx(
    {
      "vqa_accuracy": 100 * (1 + 1 + third) / 3,
      "answer_type/yes/no": 100.0,
      "answer_type/other": 50 * (1 + third),
      "questions": 3.0,
    }
  )
  rows = json.loads((tmp_path / "predictions" / "test.json").read_text())
  said = ["s10", "s40", "x", "x"]
  assert rows == [
    {"question_id": 70 + i, "answer": word} for i, word in enumerate(said)
  ]
  text = report.table({"test": got})
  assert "3 questions" in text and "yes/no" in text


def test_what_cannot_be_is_told(tmp_path):
  found = source(tmp_path)
  listed = dict(answers=str(tmp_path / "answers.json"))
  cases = {
    "how='guess': want one of rank, generate, choose": dict(how="guess"),
    r"how='rank': objectives\.vqa cannot": dict(objective=fakes.Itm(), **listed),
    "how='choose' wants a list": dict(how="choose"),
  }
  for match, fields in cases.items():
    with pytest.raises(ValueError, match=match):
      evaluator(tmp_path, found=found, **fields)
  with pytest.raises(FileNotFoundError, match="no such file"):
    evaluator(tmp_path, found=found, answers=str(tmp_path / "nope.json"))
  with pytest.raises(ValueError, match="gives no answers of people"):
    evaluator(tmp_path, found=fakes.Source((1, 2)), **listed)
  made = evaluator(tmp_path, found=found, how="choose", objective=Answers(5), **listed)
  with pytest.raises(ValueError, match=r"has 3 texts, but objectives\.vqa has 5"):
    made(fakes.variables())
