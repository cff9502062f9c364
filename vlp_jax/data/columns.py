"""What a batch has beside images and captions, for objectives that ask for it.

An objective's `columns` say names, shapes and types; here is how each is made of raw
examples: labels, second images, answers, codes.

Shape letters: B batch, R side of the image, A answers, T tokens of an answer.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

from vlp_jax.data import ops_image

# Column -> what a raw example must have for it.
NEEDS = {
  "label": "label",
  "image2": "image2",
  "answer": "answers",
  "answer_mask": "answers",
  "answer_weight": "answers",
  "answer_scores": "answer_scores",
  "codes": "codes",
}

# What a batch lacks whose examples are no pairs.
LACKS = {"pairs": (), "images": ("text", "text_mask"), "texts": ("image",)}


def image(res: int | tuple[int, ...]) -> tuple[tuple[int, ...], str]:
  """(shape, dtype) of an example's image, for an image encoder of this `res`.

  The side of a square picture, or the shape of the rows that it reads (regions).
  """
  return ((res, res, 3), "uint8") if isinstance(res, int) else (res, "float32")


def of(objectives: Mapping[str, Any], *, res: int) -> "Columns":
  """What these objectives want of an example whose image is of `res` pixels.

  An objective that wants more than image and text has a method `columns(res) ->
  {name: (shape, dtype)}`.
  """
  specs = {}
  for objective in objectives.values():
    if hasattr(objective, "columns"):
      specs |= objective.columns(res)
  return Columns(specs)


@dataclasses.dataclass(frozen=True)
class Columns:
  """Makes the columns that are asked for.

  Attributes:
    specs: {name: (shape of one example, dtype)}.
  """

  specs: Mapping[str, tuple[tuple[int, ...], str]] = dataclasses.field(
    default_factory=dict
  )

  def __post_init__(self):
    unknown = [name for name in self.specs if name not in NEEDS]
    if unknown:
      raise ValueError(
        f"data: no column {unknown[0]!r} can be made of examples; there are"
        f" {', '.join(NEEDS)}."
      )

  def example(self, raw: Mapping[str, Any], op: Any, rng: Any) -> dict[str, Any]:
    """What an example is to keep of a raw record, its second image preprocessed.

    Raises:
      BadRecordError: it lacks what a column needs.
    """
    kept = {}
    for name in self.specs:
      need = NEEDS[name]
      if raw.get(need) is None:
        raise ops_image.BadRecordError(f"no {need}")
      kept[need] = raw[need]
    if "image2" in kept:
      # Cropped and turned by draws of its own, as the official code does.
      second = op({"image": kept["image2"], "caption": raw["captions"][0]}, rng)
      kept["image2"] = second["image"]
      if "image_size" in second:
        kept["image2_size"] = second["image_size"]
    return kept

  def batch(self, rows: list[Mapping[str, Any]], tokenizer: Any) -> dict[str, Any]:
    """The columns of a batch of examples."""
    out = {}
    if "label" in self.specs:
      out["label"] = np.array([row["label"] for row in rows], np.int32)
    if "image2" in self.specs:
      out["image2"] = np.stack([row["image2"] for row in rows])
      if "image2_size" in rows[0]:
        out["image2_size"] = np.stack([row["image2_size"] for row in rows])
    if "answer_scores" in self.specs:
      out["answer_scores"] = self._scores(rows)
    if "answer" in self.specs:
      out |= self._answers(rows, tokenizer)
    if "codes" in self.specs:
      out["codes"] = np.stack([self._codes(row["codes"]) for row in rows])
    return out

  def _codes(self, codes):
    """int32 [P], a discrete code of each patch, by rows."""
    (patches,), _ = self.specs["codes"]
    codes = np.asarray(codes, np.int32).reshape(-1)
    if len(codes) != patches:
      raise ValueError(
        f"data: {len(codes)} codes of an image, but the objective's patches={patches}:"
        " say as many as the model has (196 of 224 pixels in patches of 16)."
      )
    return codes

  def _scores(self, rows):
    """float32 [B, C] of each row's {number of an answer: score}."""
    (classes,), _ = self.specs["answer_scores"]
    scores = np.zeros((len(rows), classes), np.float32)
    for b, row in enumerate(rows):
      for number, score in row["answer_scores"].items():
        if number >= classes:
          raise ValueError(
            f"data: answer {number} of a question, but objectives.vqa_scores.answers="
            f"{classes}: say how many there are."
          )
        scores[b, number] = score
    return scores

  def _answers(self, rows, tokenizer):
    """Ids, mask, weights: the heaviest A of more, the first tokens of longer ones."""
    (most, length), _ = self.specs["answer"]
    vocab, shape = tokenizer.vocab, (len(rows), most, length)
    ids, mask = np.full(shape, vocab.pad, np.int32), np.zeros(shape, bool)
    weight = np.zeros(shape[:2], np.float32)
    for b, row in enumerate(rows):
      ranked = sorted(row["answers"].items(), key=lambda item: -item[1])[:most]
      texts, shares = [a for a, _ in ranked], [share for _, share in ranked]
      count = len(ranked)
      ids[b, :count], mask[b, :count] = answer_ids(texts, tokenizer, length)
      weight[b, :count] = shares
    return dict(answer=ids, answer_mask=mask, answer_weight=weight)


def answer_ids(
  texts: list[str], tokenizer: Any, length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Answers as a model writes them: ([CLS] pieces [SEP], their mask).

  Args:
    texts: A answers. length: T, at which longer ones lose their last pieces; None: that
      of the longest.

  Returns:
    (int32 [A, T], bool [A, T]).
  """
  vocab = tokenizer.vocab
  pieces, real = tokenizer.encode(texts)
  rows = [
    [int(i) for i in row[there] if i != vocab.sep]
    for row, there in zip(pieces, real, strict=True)
  ]
  length = length or max(map(len, rows)) + 1
  ids = np.full((len(rows), length), vocab.pad, np.int32)
  mask = np.zeros((len(rows), length), bool)
  for a, row in enumerate(rows):
    # An answer ends, so that the model can say that it does.
    row = [*row[: length - 1], vocab.sep]
    ids[a, : len(row)], mask[a, : len(row)] = row, True
  return ids, mask
