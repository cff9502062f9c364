"""Metrics on disk: one JSON object a line, and TensorBoard's event files."""

from collections.abc import Mapping
import json
import math
import os
import pathlib
from typing import Any


class Writer:
  """Writes the metrics of a run; a resumed run goes on in the same file.

  Every line of metrics.jsonl holds "step" and values. Lines from beyond the step that a
  run resumes at are cut, so that a run which was interrupted leaves the file of one
  which was not (but for times).
  """

  def __init__(self, directory: pathlib.Path, *, start: int = 0, tensorboard: bool):
    """Opens DIR/metrics.jsonl, keeping the lines up to step `start`."""
    self._path = pathlib.Path(directory) / "metrics.jsonl"
    kept = [line for line in read(self._path) if line["step"] <= start]
    if self._path.exists():
      _replace(self._path, "".join(json.dumps(line) + "\n" for line in kept))
    self._file = self._path.open("a", encoding="utf-8")
    self._failed = False
    self._events = None
    if tensorboard:
      # Here, not above: a machine that only trains need not have it.
      import tensorboardX

      self._events = tensorboardX.SummaryWriter(
        str(pathlib.Path(directory) / "tensorboard"), purge_step=start or None
      )

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """One line; numbers that are not finite are written as null.

    Raises:
      OSError: the disk does not take it; names the file.
    """
    plain = {key: _plain(value) for key, value in values.items()}
    try:
      self._file.write(json.dumps({"step": step, **plain}) + "\n")
      self._file.flush()
    except OSError as error:
      self._failed = True
      raise OSError(
        f"log: {self._path} cannot be written: {error}. Make room there and start"
        " again: the run goes on from its last whole checkpoint."
      ) from error
    if self._events:
      for key, value in plain.items():
        if isinstance(value, int | float):
          self._events.add_scalar(key, value, step)

  def close(self) -> None:
    try:
      self._file.close()
    except OSError:
      # What could not be written is tried once more; it has been told of already.
      if not self._failed:
        raise
    if self._events:
      self._events.close()


class NoWriter:
  """What the processes beside the first write: nothing."""

  def write(self, step: int, values: Mapping[str, float]) -> None:
    pass

  def close(self) -> None:
    pass


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of a metrics.jsonl; one that was cut off by a crash is left out."""
  if not pathlib.Path(path).exists():
    return []
  lines = []
  for text in pathlib.Path(path).read_bytes().splitlines():
    try:
      line = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
      continue
    if isinstance(line, dict) and "step" in line:
      lines.append(line)
  return lines


def _plain(value):
  value = float(value) if not isinstance(value, int | str) else value
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path, text):
  """Writes a file so that it is never half there."""
  partial = path.with_suffix(".part")
  partial.write_text(text, "utf-8")
  os.replace(partial, path)
