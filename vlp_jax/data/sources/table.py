"""Images and captions of one's own: a table that names image files, or a folder."""

from collections.abc import Iterator
import csv
import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

import numpy as np

IMAGES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")
TABLES = (".jsonl", ".json", ".tsv", ".csv")
PROBED = 20  # image files that are looked for before anything starts


@dataclasses.dataclass(frozen=True)
class Source:
  """Pairs of a .jsonl, ALBEF's .json, a .tsv or .csv with a header, or a folder.

  A row has "image" (a path, relative to `root`) and "caption" or "captions": a text, or
  a list of them. Rows of one image are one example with all their captions: rows of one
  "image_id" where they have it, of one path where they do not. A table with "split" in
  its rows may be read by split.
  In a folder, each image's captions are the lines of the .txt file of the same name.

  Attributes:
    path: of the table or folder.
    root: folder that image paths are relative to; None: that of the table.
    split: only rows whose "split" says so; None: all.
    suffix: of the files that are read, where it is not that of the images' names:
      ".npz" for regions of a detector (data/regions.py), which lie under `root` as the
      images do elsewhere.
  """

  path: str
  root: str | None = None
  split: str | None = None
  suffix: str | None = None

  def __post_init__(self):
    path = pathlib.Path(self.path)
    if not path.exists():
      raise FileNotFoundError(
        f"config: source.path={self.path}: no such table or folder; set"
        " --config.data.source.path=… to a .jsonl, .json, .tsv or .csv file with the"
        ' fields "image" and "caption", or a folder of images with .txt files.'
      )
    if not self._folder.is_dir():
      raise FileNotFoundError(
        f"config: source.root={self.root}: no such folder; set"
        " --config.data.source.root=… to the one that image paths are relative to."
      )
    if self.suffix is not None and not self.suffix.startswith("."):
      raise ValueError(f"config: source.suffix={self.suffix!r}: want one like '.npz'.")
    if not self._rows:
      raise ValueError(
        f"config: source.path={self.path}: is empty: no image with a caption."
      )
    first = [self._file(row[0]) for row in self._rows[:PROBED]]
    what = "images" if self.suffix is None else f"{self.suffix} files"
    if not any(os.path.isfile(file) for file in first):
      raise FileNotFoundError(
        f"config: source.path={self.path}: none of its first {len(first)} {what} is"
        f" there, the first would be {first[0]}; set --config.data.source.root=… to the"
        f' folder that "{self._rows[0][0]}" is relative to.'
      )

  def __len__(self) -> int:
    return len(self._rows)

  def read(self, indices: np.ndarray) -> list[dict]:
    """Raw examples: image (file's bytes), captions, image_id, key (the path)."""
    return [self._example(int(index)) for index in indices]

  def captions(self, indices: np.ndarray) -> list[str]:
    """All captions of these images, without reading the images."""
    texts = (text for index in indices for text in self._rows[int(index)][1])
    return [text.encode("utf-8", "replace").decode("utf-8") for text in texts]

  def _example(self, index):
    image, captions = self._rows[index]
    file = self._file(image)
    example = {"image": b"", "captions": captions, "image_id": index, "key": file}
    try:
      with open(file, "rb", buffering=0) as opened:
        example["image"] = opened.read()
    except OSError as error:
      # A file that is gone is a broken record like any other: counted and named.
      missing = isinstance(error, FileNotFoundError)
      example["error"] = "file is missing" if missing else "file cannot be read"
    return example

  def _file(self, image):
    # For each image of a run: pathlib would take as long as reading it.
    file = os.path.join(self._root, image)
    if self.suffix is None:
      return file
    return str(pathlib.Path(file).with_suffix(self.suffix))

  @functools.cached_property
  def _root(self) -> str:
    return str(self._folder)

  @functools.cached_property
  def _folder(self) -> pathlib.Path:
    """What image paths are relative to."""
    path = pathlib.Path(self.path)
    return pathlib.Path(self.root or (path if path.is_dir() else path.parent))

  @functools.cached_property
  def _rows(self) -> list[tuple[str, list[str]]]:
    """(image path, captions) of every image, in the table's order."""
    path = pathlib.Path(self.path)
    if path.is_dir():
      if self.split is not None:
        raise ValueError(
          f"config: source.split={self.split!r}: a folder has no splits: set"
          " --config.data.source.path=… to the folder of the split."
        )
      return _folder_rows(path)
    rows: dict[Any, tuple[str, list[str]]] = {}
    splits = set()
    for where, row in _table_rows(path):
      if self.split is not None:
        splits.add(str(_field(row, ("split",), path, where)))
        if str(row["split"]) != self.split:
          continue
      image = _field(row, ("image",), path, where)
      captions = _field(row, ("captions", "caption"), path, where)
      captions = [captions] if isinstance(captions, str) else captions
      texts = isinstance(captions, list) and all(isinstance(c, str) for c in captions)
      if not (isinstance(image, str) and image and texts):
        raise ValueError(
          f'{path}, {where}: wants "image", a path, and "caption", a text or a list of'
          f" texts; has {image!r} and {str(captions)[:80]}."
        )
      key = row.get("image_id")
      key = ("path", image) if key is None else ("id", str(key))
      first, texts = rows.setdefault(key, (image, []))
      if first != image:
        raise ValueError(
          f"{path}, {where}: image_id {row['image_id']!r} is that of {first} above, and"
          f" here of {image}: an id belongs to one image."
        )
      texts.extend(captions)
    if splits and not rows:
      raise ValueError(
        f"config: source.split={self.split!r}: {path} has {', '.join(sorted(splits))}."
      )
    return list(rows.values())


def _field(row, names, path, where):
  for name in names:
    if name in row:
      # None: a row of a .csv that ends early, or JSON's null.
      return "" if row[name] is None else row[name]
  raise ValueError(
    f'{path}, {where}: no field "{names[-1]}"; its fields:'
    f" {', '.join(map(str, row)) or 'none'}."
  )


def _table_rows(path: pathlib.Path) -> Iterator[tuple[str, dict]]:
  """(where, row) of every row.

  Bytes that are not UTF-8 become surrogates, which whoever uses a caption refuses: one
  bad row of many is a broken record, not the end.
  """
  if path.suffix not in TABLES:
    raise ValueError(
      f"config: source.path={path}: wants a table ({', '.join(TABLES)}) or a folder."
    )
  encoding = dict(encoding="utf-8-sig", errors="surrogateescape")
  if path.suffix == ".json":
    rows = _json(path, path.read_text(**encoding), "the file")
    if not isinstance(rows, list):
      raise ValueError(f"{path}: wants a list of rows, has a {type(rows).__name__}.")
    for number, row in enumerate(rows, 1):
      yield f"row {number}", _dict(path, row, f"row {number}")
  elif path.suffix == ".jsonl":
    with path.open(**encoding) as lines:
      for number, line in enumerate(lines, 1):
        if line.strip():
          where = f"line {number}"
          yield where, _dict(path, _json(path, line, where), where)
  else:
    with path.open(newline="", **encoding) as lines:
      # In a .tsv a quote is a letter like any other.
      tabs = dict(delimiter="\t", quoting=csv.QUOTE_NONE)
      rows = csv.DictReader(lines, **(tabs if path.suffix == ".tsv" else {}))
      try:
        for row in rows:
          yield f"line {rows.line_num}", {k: v for k, v in row.items() if k}
      except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: {error}.") from error


def _json(path, text, where):
  try:
    return json.loads(text)
  except json.JSONDecodeError as error:
    raise ValueError(f"{path}, {where}: no JSON: {error}.") from error


def _dict(path, row, where):
  if not isinstance(row, dict):
    raise ValueError(f"{path}, {where}: wants fields, has {str(row)[:80]}.")
  return row


def _folder_rows(path):
  rows, without = [], []
  for file in sorted(path.rglob("*")):
    if file.suffix.lower() in IMAGES and not file.name.startswith("."):
      name, texts = str(file.relative_to(path)), file.with_suffix(".txt")
      if texts.is_file():
        lines = texts.read_text("utf-8-sig", "surrogateescape").splitlines()
        # An empty file is an empty caption: a broken record.
        rows.append((name, [line for line in lines if line.strip()] or [""]))
      else:
        without.append(name)
  if without:
    raise FileNotFoundError(
      f"config: source.path={path}: {len(without)} of {len(rows) + len(without)} images"
      f" have no .txt file of the same name, the first is {without[0]}: write its"
      " captions there, one a line, or take the image out."
    )
  return rows
