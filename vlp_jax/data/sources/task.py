"""Examples of a task, one a row: an image and a text, with a class or with answers."""

import collections
import dataclasses
import functools
import json
import pathlib

import numpy as np

TEXTS = ("caption", "sentence", "question")
# What a row may say of its question, for the official files and tables.
NOTES = ("question_id", "question_type", "answer_type")


@dataclasses.dataclass(frozen=True)
class Source:
  """Rows of a .jsonl, or of a .json that is a list; ALBEF's files are such.

  A row has "image", or "images" with two paths, a text ("caption", "sentence" or
  "question"), and what its task needs: "label", an int or one of `classes`, or
  "answers" (or "answer"): a text, a list of texts with as many of each as people gave,
  or {text: weight}; or "answer_scores": {number of an answer: score}, of 0 to 1.

  Attributes:
    path: of the table, or several with commas between.
    root: folder that image paths are relative to; None: that of the table.
    suffix: of image files, where the table leaves it out (".jpg").
    classes: names of classes 0, 1, ….
    answer_weight: of an answer that stands alone; ALBEF gives those of Visual Genome,
      of which there is one a question, 0.5.
  """

  path: str
  root: str | None = None
  suffix: str = ""
  classes: tuple[str, ...] = ()
  answer_weight: float = 1.0

  def __post_init__(self):
    if not self._rows:
      raise ValueError(f"config: source.path={self.path}: is empty.")

  def __len__(self) -> int:
    return len(self._rows)

  def read(self, indices: np.ndarray) -> list[dict]:
    """Raw examples; see sources/__init__.py, and label, image2 (bytes), answers."""
    return [self._example(int(index)) for index in indices]

  def captions(self, indices: np.ndarray) -> list[str]:
    """The texts, without reading the images."""
    return [self._rows[int(index)][2][0] for index in indices]

  def notes(self, indices: np.ndarray) -> list[dict]:
    """What rows say of their questions, without reading images.

    `NOTES` where a row has them, and "given": the answers of each person, where they
    are a list.
    """
    return [self._rows[int(index)][4] for index in indices]

  def _example(self, index):
    images, number, captions, more, _ = self._rows[index]
    example = {"captions": captions, "image_id": number, "key": str(images[0]), **more}
    try:
      example["image"] = images[0].read_bytes()
      if len(images) > 1:
        example["image2"] = images[1].read_bytes()
    except OSError as error:
      missing = isinstance(error, FileNotFoundError)
      example |= {"image": b"", "key": str(error.filename)}
      example["error"] = "file is missing" if missing else "file cannot be read"
    return example

  @functools.cached_property
  def _rows(self):
    """[(image paths, image id, [text], {label and answers}, notes)] in their order."""
    rows, ids = [], {}
    for name in self.path.split(","):
      path = pathlib.Path(name.strip())
      if not path.is_file():
        raise FileNotFoundError(
          f"config: source.path={path}: no such table; set --config.data.source.path=…"
          ' to a .jsonl or .json file of rows with "image" and "caption".'
        )
      folder = pathlib.Path(self.root or path.parent)
      for where, row in _table(path):
        images = row.get("images", [row.get("image")])
        texts = [row[key] for key in TEXTS if isinstance(row.get(key), str)]
        named = isinstance(images, list) and 0 < len(images) <= 2
        if not (named and all(isinstance(i, str | int) for i in images) and texts):
          raise ValueError(
            f'{path}, {where}: wants "image" (or "images", two) and one of'
            f" {', '.join(TEXTS)}; its fields: {', '.join(map(str, row))}."
          )
        files = tuple(folder / f"{image}{self.suffix}" for image in images)
        number = ids.setdefault(files[0], len(ids))
        more = self._label(row, path, where) | self._answers(row, path, where)
        more |= self._scores(row, path, where)
        rows.append((files, number, texts[:1], more, _notes(row)))
    return rows

  def _label(self, row, path, where):
    if "label" not in row:
      return {}
    label = row["label"]
    if str(label) in self.classes:
      return {"label": self.classes.index(str(label))}
    if self.classes or type(label) is not int or label < 0:
      raise ValueError(
        f"{path}, {where}: label={label!r}: want one of source.classes="
        f"{self.classes}, or an int where there are none."
      )
    return {"label": label}

  def _answers(self, row, path, where):
    answers = row.get("answers", row.get("answer"))
    if answers is None:
      return {}
    if isinstance(answers, str):
      return {"answers": {answers: self.answer_weight}}
    if isinstance(answers, list) and all(isinstance(a, str) for a in answers):
      counts = collections.Counter(answers)
      return {"answers": {a: n / len(answers) for a, n in counts.items()}}
    numbers = isinstance(answers, dict) and answers.values()
    if numbers and all(type(n) in (int, float) and n > 0 for n in numbers):
      return {"answers": {a: float(n) for a, n in answers.items()}}
    raise ValueError(
      f'{path}, {where}: "answers" wants a text, a list of texts or {{text: weight}};'
      f" has {str(answers)[:80]}."
    )

  def _scores(self, row, path, where):
    scores = row.get("answer_scores")
    if scores is None:
      return {}
    try:
      found = {int(number): float(score) for number, score in scores.items()}
    except (AttributeError, TypeError, ValueError):
      found = {-1: 0.0}
    if any(n < 0 or not 0 <= score <= 1 for n, score in found.items()):
      raise ValueError(
        f'{path}, {where}: "answer_scores" wants {{number of an answer: score of 0 to'
        f" 1}}; has {str(scores)[:80]}."
      )
    return {"answer_scores": found}


def _notes(row):
  notes = {name: row[name] for name in NOTES if name in row}
  answers = row.get("answers", row.get("answer"))
  return notes | ({"given": answers} if isinstance(answers, list) else {})


def _table(path):
  """(where, row) of every row."""
  text = path.read_text("utf-8-sig")
  try:
    if path.suffix == ".json":
      rows = enumerate(json.loads(text), 1)
      found = [(f"row {number}", row) for number, row in rows]
    else:
      lines = enumerate(text.splitlines(), 1)
      found = [(f"line {n}", json.loads(line)) for n, line in lines if line.strip()]
  except (json.JSONDecodeError, TypeError) as error:
    raise ValueError(f"{path}: wants JSON rows: {error}.") from error
  for where, row in found:
    if not isinstance(row, dict):
      raise ValueError(f"{path}, {where}: wants fields, has {str(row)[:80]}.")
  return found
