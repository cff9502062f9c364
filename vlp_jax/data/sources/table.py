"""Images and captions of one's own: a table that names image files, or a folder."""

from collections.abc import Iterator
import csv
import dataclasses
import functools
import json
import pathlib

import numpy as np

IMAGES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")


@dataclasses.dataclass(frozen=True)
class Source:
  """Pairs of a .jsonl, ALBEF's .json, a .tsv or .csv with a header, or a folder.

  A row has "image" (a path, relative to `root`) and "caption" (or "captions"): a text,
  or a list of them. Rows of one image are one image, by `image_id` if the row has it.
  In a folder, each image's captions are the lines of the .txt file of the same name.

  Attributes:
    path: of the table or folder.
    root: folder that image paths are relative to; None: that of the table.
  """

  path: str
  root: str | None = None

  def __post_init__(self):
    path = pathlib.Path(self.path)
    if not path.exists():
      raise FileNotFoundError(
        f"config: source.path={self.path}: no such table or folder; set"
        " --config.data.source.path=… to a .jsonl, .json, .tsv or .csv file with the"
        ' fields "image" and "caption", or a folder of images with .txt files.'
      )
    if not self._rows:
      raise ValueError(
        f"config: source.path={self.path}: is empty: no image with a caption."
      )

  def __len__(self) -> int:
    return len(self._rows)

  @functools.cached_property
  def _rows(self) -> list[tuple[str, list[str | bytes], int]]:
    """(image path, captions, image id) of every image, in the table's order."""
    path = pathlib.Path(self.path)
    if path.is_dir():
      return _folder(path)
    rows = {}
    for where, row in _read_table(path):
      image, captions = row.get("image"), row.get("captions", row.get("caption"))
      if not image or captions is None:
        lacks = "caption" if image else "image"
        raise ValueError(
          f'{path}, {where}: no field "{lacks}" (fields: {", ".join(map(str, row))}).'
        )
      captions = [captions] if isinstance(captions, str) else list(captions)
      key = row.get("image_id", image)
      if key in rows:
        rows[key][1].extend(captions)
      else:
        rows[key] = (str(image), captions)
    return [(image, texts, i) for i, (image, texts) in enumerate(rows.values())]

  def read(self, indices: np.ndarray) -> list[dict]:
    """Raw examples: image (file's bytes), captions, image_id, key (the path)."""
    return [self._example(int(index)) for index in indices]

  def captions(self, indices: np.ndarray) -> list[str]:
    """All captions of these images, without reading the images."""
    texts = (text for index in indices for text in self._rows[int(index)][1])
    return [
      text if isinstance(text, str) else text.decode("utf-8", "replace")
      for text in texts
    ]

  def _example(self, index):
    image, captions, image_id = self._rows[index]
    path = pathlib.Path(self.path)
    root = path if path.is_dir() else path.parent
    file = pathlib.Path(self.root or root) / image
    # A file that is gone is a broken record like any other: counted and named.
    data = file.read_bytes() if file.is_file() else b""
    return {"image": data, "captions": captions, "image_id": image_id, "key": str(file)}


def _read_table(path: pathlib.Path) -> Iterator[tuple[str, dict]]:
  """(where, row) of every row."""
  if path.suffix == ".json":
    rows = _json(path, path.read_text("utf-8"), "the file")
    if not isinstance(rows, list):
      raise ValueError(f"{path}: wants a list of rows, has a {type(rows).__name__}.")
    for number, row in enumerate(rows, 1):
      yield f"row {number}", _dict(path, row, f"row {number}")
  elif path.suffix in (".jsonl", ".json_lines"):
    with path.open(encoding="utf-8", errors="surrogateescape") as lines:
      for number, line in enumerate(lines, 1):
        if line.strip():
          where = f"line {number}"
          yield where, _dict(path, _json(path, line, where), where)
  elif path.suffix in (".tsv", ".csv"):
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
      rows = csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",")
      for row in rows:
        yield f"line {rows.line_num}", {k: v for k, v in row.items() if k}
  else:
    raise ValueError(
      f"config: source.path={path}: wants a .jsonl, .json, .tsv or .csv table, or a"
      " folder."
    )


def _json(path, text, where):
  try:
    return json.loads(text)
  except json.JSONDecodeError as error:
    raise ValueError(f"{path}, {where}: no JSON: {error}.") from error


def _dict(path, row, where):
  if not isinstance(row, dict):
    raise ValueError(f"{path}, {where}: wants fields, has {row!r}.")
  return row


def _folder(path):
  rows = []
  for file in sorted(path.rglob("*")):
    if file.suffix.lower() in IMAGES:
      texts = file.with_suffix(".txt")
      if texts.is_file():
        captions = [line for line in texts.read_bytes().splitlines() if line.strip()]
        rows.append((str(file.relative_to(path)), captions or [b""], len(rows)))
  return rows
