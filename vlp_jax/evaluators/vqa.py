"""Accuracy of answers to questions about images, by the official count of VQA.

VQA (https://arxiv.org/abs/1505.00468); ALBEF's VQA.py and BLIP's train_vqa.py rank a
list of answers or write one, ViLT and METER choose one of 3,129.
"""

import collections
from collections.abc import Sequence
import dataclasses
import json
import pathlib
from typing import Any, Literal

import jax
import numpy as np

from vlp_jax.data import columns as columns_lib
from vlp_jax.data import evaluation
from vlp_jax.data import pp as pp_lib
from vlp_jax.evaluators import placement
from vlp_jax.evaluators import predictions
from vlp_jax.ops import answers as answers_lib
from vlp_jax.ops import decode

# How an answer is found -> the method of the objective that finds it.
METHODS = {"rank": "rank", "generate": "generate", "choose": "predict"}


@dataclasses.dataclass
class Evaluator:
  """The official accuracy of one answer for each question; wants a source of tasks.

  Questions without a list of what people answered (a test set) are answered, and not
  counted.

  Attributes:
    objective: the name of the objective in the config that answers.
    how: "rank" the candidates `answers` and "generate" an answer, of objectives/vqa.py;
      "choose" one of `answers`, in the order of the classes, of classify or vqa_scores.
    answers: a .json list of texts (ALBEF's answer_list.json).
    rank: how many candidates are ranked as a whole.
    beams, max_length, min_length: of an answer that is written.
    cache: keeps keys and values of what is written; the same ids without, slower.
  """

  objective: str = "vqa"
  how: Literal["rank", "generate", "choose"] = "rank"
  answers: str | None = None
  rank: int = 128
  beams: int = 3
  max_length: int = 10
  min_length: int = 1
  cache: bool = True

  def setup(
    self,
    *,
    pretrainer: Any,
    source: Any,
    tokenizer: Any,
    pp: str,
    mesh: jax.sharding.Mesh | None,
    batch_size: int,
    file: pathlib.Path | None = None,
  ) -> None:
    """Binds model and data, and makes the function that is compiled once.

    file: of the answers, a list of {"question_id", "answer"}; None: written nowhere.
    """
    place = placement.of(mesh, batch_size)
    _check_answers(self.objective, self.how, pretrainer.objectives)
    if not callable(getattr(source, "notes", None)):
      raise ValueError(
        "evals (vqa): data.source gives no answers of people: say"
        ' dict(type="task", path=…).'
      )
    self._list = self._candidates()
    find = self._finder(tokenizer)

    def answer(variables, batch):
      def call(m, batch):
        sizes = (batch["image_size"],) if "image_size" in batch else ()
        image = m.model.encode_image(batch["image"], *sizes)
        text = m.model.words(batch["text"], batch["text_mask"])
        return find(m.objectives[self.objective], m.model, image, text)

      return pretrainer.apply(variables, batch, method=call)

    sized = pp_lib.leaves_sizes(pp)
    names = ("image", "text", "text_mask", *(("image_size",) if sized else ()))

    def batches():
      for batch in evaluation.eval_pairs(
        source, pp, tokenizer, batch_size=batch_size, sizes=sized
      ):
        at = batch["example_index"][batch["valid"]]
        yield at, (place.split({name: batch[name] for name in names}),)

    self._place, self._batches, self._answer = place, batches, place.jit(answer)
    self._source, self._tokenizer, self._file = source, tokenizer, file

  def __call__(self, variables: Any) -> dict[str, float]:
    """Percentages: "vqa_accuracy", and of the types that the source tells,
    "answer_type/…" and "question_type/…"; "questions", how many count."""
    rows, scores = [], collections.defaultdict(list)
    for at, found in self._place.run(self._answer, variables, self._batches()):
      for index, row in zip(at, found, strict=False):
        (notes,) = self._source.notes(np.array([index]))
        answer = self._text(row)
        rows.append({"question_id": notes.get("question_id", int(index))})
        rows[-1]["answer"] = answer
        for name, score in _scored(answer, notes).items():
          scores[name].append(score)
    predictions.write(self._file, rows)
    out = {name: 100.0 * float(np.mean(each)) for name, each in scores.items()}
    return out | {"questions": float(len(scores["vqa_accuracy"]))}

  def _candidates(self):
    """The list of answers, where there is one."""
    if self.how == "generate":
      return ()
    if self.answers is None:
      raise ValueError(
        f"evals (vqa): how={self.how!r} wants a list: say answers=…, a .json of texts."
      )
    path = pathlib.Path(self.answers)
    if not path.is_file():
      raise FileNotFoundError(f"evals (vqa): answers={self.answers}: no such file.")
    found = json.loads(path.read_text("utf-8"))
    if not (isinstance(found, list) and found and all(map(_is_text, found))):
      raise ValueError(f"evals (vqa): answers={self.answers}: want a list of texts.")
    return tuple(found)

  def _finder(self, tokenizer):
    """(objective, model, image Tokens, question Tokens) -> int32 [B] or [B, T]."""
    if self.how == "choose":

      def choose(objective, model, image, text):
        logits = objective.predict(model, image, text)
        if logits.shape[1] != len(self._list):
          raise ValueError(
            f"evals (vqa): answers={self.answers} has {len(self._list)} texts, but"
            f" objectives.{self.objective} has {logits.shape[1]} classes."
          )
        return logits.argmax(axis=1)

      return choose
    if self.how == "generate":
      vocab = tokenizer.vocab
      settings = decode.Settings(
        max_length=self.max_length,
        min_length=self.min_length,
        beams=self.beams,
        eos=vocab.sep,
        pad=vocab.pad,
        cache=self.cache,
      )
      return lambda objective, model, image, text: objective.generate(
        model, model.fuse(image, text), settings
      )
    ids, mask = columns_lib.answer_ids(list(self._list), tokenizer)
    most = min(self.rank, len(ids))

    def rank(objective, model, image, text):
      question = model.fuse(image, text)
      order, _ = objective.rank(model, question, ids, mask, most=most)
      return order[:, 0]

    return rank

  def _text(self, found):
    """The answer that a class or a row of ids stands for."""
    if self.how != "generate":
      return self._list[int(found)]
    return predictions.text(found[1:], self._tokenizer)


def _check_answers(name, how, objectives):
  if how not in METHODS:
    raise ValueError(f"evals (vqa): how={how!r}: want one of {', '.join(METHODS)}.")
  if name not in objectives:
    raise ValueError(
      f"evals (vqa): objective={name!r}: the run has {', '.join(objectives)}."
    )
  if not callable(getattr(objectives[name], METHODS[how], None)):
    raise ValueError(
      f"evals (vqa): how={how!r}: objectives.{name} cannot: objectives/vqa.py ranks and"
      ' generates, classify and vqa_scores "choose".'
    )


def _scored(answer: str, notes: dict[str, Any]) -> dict[str, float]:
  """{metric: accuracy} of one question; none where nobody was asked."""
  given: Sequence[str] = notes.get("given", ())
  if not given:
    return {}
  score = answers_lib.accuracy(answer, given)
  kinds = ("answer_type", "question_type")
  typed = {f"{kind}/{notes[kind]}": score for kind in kinds if kind in notes}
  return {"vqa_accuracy": score} | typed


def _is_text(x):
  return isinstance(x, str)
