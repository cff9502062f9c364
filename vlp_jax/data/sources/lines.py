"""Texts alone: each line of plain files, for `data.kinds.NAME.holds="texts"`."""

import dataclasses
import functools
import pathlib

import numpy as np

CHUNK = 1 << 26  # bytes that are looked through at once


@dataclasses.dataclass(frozen=True)
class Source:
  """Lines of UTF-8 files that are not empty; a line is read when it is asked for.

  Where lines begin is looked up once, at the start of a run: about a second a GB.

  Attributes:
    path: of a file, or several with commas between.
  """

  path: str

  def __post_init__(self):
    if not len(self):
      raise ValueError(f"config: source.path={self.path}: has no line with a text.")

  def __len__(self) -> int:
    return sum(len(starts) for _, starts, _ in self._files)

  def read(self, indices: np.ndarray) -> list[dict]:
    """Raw examples without an image; see sources/__init__.py."""
    return [
      {
        "image": b"",
        "error": "a text has no image",
        "captions": [self._line(int(index))],
        "image_id": int(index) % 2**31,
        "key": f"{self.path}, text {int(index)}",
      }
      for index in indices
    ]

  def captions(self, indices: np.ndarray) -> list[bytes]:
    """The lines, as bytes that should be UTF-8."""
    return [self._line(int(index)) for index in indices]

  def _line(self, index):
    for path, starts, ends in self._files:
      if index < len(starts):
        with path.open("rb") as file:
          file.seek(int(starts[index]))
          return file.read(int(ends[index] - starts[index])).strip()
      index -= len(starts)
    raise IndexError(f"{self.path} has {len(self)} texts.")

  @functools.cached_property
  def _files(self):
    """[(path, int64 starts, int64 ends)] of the lines of each file."""
    found = []
    for name in self.path.split(","):
      path = pathlib.Path(name.strip())
      if not path.is_file():
        raise FileNotFoundError(
          f"config: source.path={path}: no such file; set"
          " --config.data.kinds.NAME.source.path=… to a text file, one text a line."
        )
      found.append((path, *_lines(path)))
    return found


def _lines(path):
  """(starts, ends) of the lines with more than white space at their ends."""
  breaks, at = [np.array([-1])], 0
  with path.open("rb") as file:
    while chunk := file.read(CHUNK):
      breaks.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + at)
      at += len(chunk)
  breaks.append(np.array([at]))
  edges = np.concatenate(breaks).astype(np.int64)
  starts, ends = edges[:-1] + 1, edges[1:]
  # A line of one byte or none is a blank one, or the \r of another system.
  kept = ends - starts > 1
  return starts[kept], ends[kept]
