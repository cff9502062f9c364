"""Metrics on disk: one JSON object a line, and TensorBoard's event files."""

from collections.abc import Mapping
import json
import logging
import math
import pathlib
import shutil
import tempfile
import time
from typing import Any

from etils import epath

_log = logging.getLogger(__name__)


class Writer:
  """Writes the metrics of a run; a resumed run goes on in the same file.

  Every line of metrics.jsonl holds "step" and values. Lines from beyond the step that a
  run resumes at are cut, so that a run which was interrupted leaves the file of one
  which was not (but for times).

  On a disk every line is there at once. An object store takes whole files alone: there
  both are written every half minute, at `flush`, and at the end.
  """

  def __init__(self, directory: epath.PathLike, *, start: int = 0, tensorboard: bool):
    """Opens DIR/metrics.jsonl, keeping the lines up to step `start`."""
    self._directory = epath.Path(directory)
    path = self._directory / "metrics.jsonl"
    self._file = _Rewritten(path) if "://" in str(path) else _Appended(path)
    self._failed = False
    self._tensorboard, self._start = tensorboard, start
    self._events = self._events_at = None
    self.cut(start)

  def cut(self, step: int) -> None:
    """Leaves out what is beyond this step: the run goes on from there."""
    kept = [line for line in self._file.read() if line["step"] <= step]
    # What was evaluated, for `has`: by step, names of values.
    self._there = {}
    for line in kept:
      self._there.setdefault(line["step"], set()).update(line)
    self._file.replace("".join(json.dumps(line) + "\n" for line in kept))

  def has(self, step: int, name: str) -> bool:
    """Whether something of this name, as "NAME/…", is written at the step."""
    names = self._there.get(step, ())
    return any(each.startswith(f"{name}/") for each in names)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """One line; numbers that are not finite are written as null.

    Raises:
      OSError: the disk does not take it; names the file.
    """
    plain = {key: _plain(value) for key, value in values.items()}
    try:
      self._file.write(json.dumps({"step": step, **plain}) + "\n")
    except OSError as error:
      self._failed = True
      raise OSError(
        f"log: {self._file.path} cannot be written: {error}. Make room there and start"
        " again: the run goes on from its last whole checkpoint."
      ) from error
    if self._tensorboard:
      self._events = self._events or self._open_events()
      for key, value in plain.items():
        if isinstance(value, int | float):
          self._events.add_scalar(key, value, step)

  def _open_events(self):
    # Here, not above: it imports PyTorch where there is one, which takes a second. By
    # now a step has been logged, and the device has the next.
    import tensorboardX

    folder = self._directory / "tensorboard"
    if isinstance(self._file, _Rewritten):
      self._events_at, folder = folder, tempfile.mkdtemp(prefix="vlp_jax")
    return tensorboardX.SummaryWriter(str(folder), purge_step=self._start or None)

  def flush(self) -> None:
    """What is written so far is in its place, if the place takes it."""
    try:
      self._file.flush()
      if self._events_at:
        self._events.flush()
        self._copy_events()
    except OSError as error:
      _log.warning("log: %s: %s; it is tried again later.", self._file.path, error)

  def _copy_events(self):
    self._events_at.mkdir(parents=True, exist_ok=True)
    for file in pathlib.Path(self._events.logdir).iterdir():
      (self._events_at / file.name).write_bytes(file.read_bytes())

  def close(self) -> None:
    try:
      self._file.close()
    except OSError:
      # What could not be written is tried once more; it has been told of already.
      if not self._failed:
        raise
    if self._events:
      self._events.close()
      if self._events_at:
        self._copy_events()
        shutil.rmtree(self._events.logdir)


class _Appended:
  """A log on a disk."""

  def __init__(self, path):
    self.path = path
    self._file = None

  def read(self):
    return read(self.path)

  def replace(self, text):
    if self._file:
      self._file.close()
    if self.path.exists():
      partial = self.path.with_suffix(".part")
      partial.write_text(text)
      partial.replace(self.path)
    self._file = self.path.open("a")

  def write(self, line):
    self._file.write(line)
    self._file.flush()

  def flush(self):
    pass

  def close(self):
    self._file.close()


class _Rewritten:
  """A log in an object store, which is written anew every SECONDS at most."""

  SECONDS = 30.0

  def __init__(self, path):
    self.path = path
    self._text = None
    self._next = 0.0
    self._new = False

  def read(self):
    return read(self.path) if self._text is None else _lines(self._text.encode())

  def replace(self, text):
    self._text, self._new = text, True
    self.flush()

  def write(self, line):
    self._text, self._new = self._text + line, True
    if time.monotonic() >= self._next:
      try:
        self.flush()
      except OSError as error:
        # The store may be away for a while; the lines are kept here.
        _log.warning("log: %s: %s; it is tried again later.", self.path, error)

  def flush(self):
    if self._new:
      self._next = time.monotonic() + self.SECONDS
      self.path.write_text(self._text)
      self._new = False

  def close(self):
    self.flush()


class NoWriter:
  """What the processes beside the first write: nothing."""

  def write(self, step: int, values: Mapping[str, float]) -> None:
    pass

  def cut(self, step: int) -> None:
    pass

  def has(self, step: int, name: str) -> bool:
    return False

  def flush(self) -> None:
    pass

  def close(self) -> None:
    pass


def read(path: epath.PathLike) -> list[dict[str, Any]]:
  """The lines of a metrics.jsonl; one that was cut off by a crash is left out."""
  path = epath.Path(path)
  return _lines(path.read_bytes()) if path.exists() else []


def _lines(data):
  lines = []
  for text in data.splitlines():
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
