"""Loads the programs that a config's last run began with, while this one is traced.

JAX finds a program in its cache once it is traced and lowered, and only then begins to
load it, which takes as long again. Which ones it will want is written down beside the
cache. What is loaded ahead is handed out where JAX asks for that very key alone, which
it makes of the lowered program: a wrong guess costs time of another core, nothing else.

JAX has no public place for this; `tests/training/test_ahead.py` holds the one that is
used here against the JAX that is installed.
"""

import base64
from concurrent import futures
import hashlib
import json
import os
import pathlib
import time
from typing import Any

import jax
from jax._src import compilation_cache
from jax._src.lib import xla_client

# A program that is loaded in less is not worth a thread's turn, seconds.
LEAST_SECONDS = 0.02


class Programs:
  """Those of the start of a run: a context, which watches until it, or `end`, ends it.

  Of several processes each has its own devices, and none is loaded ahead.
  """

  def __init__(self, folder: str | None, config: str):
    """JAX knows its devices already, or may now look for them.

    folder: of JAX's cache, or None. config: as text; a run of it begins like its last.
    """
    self._file = None
    if folder is not None and "://" not in folder and jax.process_count() == 1:
      name = hashlib.sha256(config.encode()).hexdigest()[:16]
      self._file = pathlib.Path(folder) / f"ahead-{name}.json"
    self._plain = None
    self._coming: dict[str, tuple[bytes, list[int], futures.Future]] = {}
    self._asked: dict[str, dict[str, Any]] = {}

  def __enter__(self) -> "Programs":
    if self._file is None:
      return self
    self._plain = compilation_cache.get_executable_and_time
    compilation_cache.get_executable_and_time = self._get
    self._thread = futures.ThreadPoolExecutor(1, "ahead")
    there = {device.id: device for device in jax.devices()}
    for key, said in _read(self._file).items():
      options, ids = base64.b64decode(said["options"]), said["devices"]
      if there.keys() >= set(ids):
        devices = xla_client.DeviceList(tuple(there[i] for i in ids))
        made = self._thread.submit(self._load, key, options, devices)
        self._coming[key] = options, ids, made
    return self

  def __exit__(self, mistake: type | None, *_: Any) -> None:
    if mistake is not None:
      self._asked.clear()  # Of a start that failed, there is not all.
    self.end()

  def end(self) -> None:
    """What was asked for is written down, what was not is dropped."""
    if self._plain is None:
      return
    compilation_cache.get_executable_and_time, self._plain = self._plain, None
    self._thread.shutdown(wait=False, cancel_futures=True)
    self._coming.clear()
    if self._asked and self._asked != _read(self._file):
      written = self._file.with_suffix(f".{os.getpid()}")
      try:
        written.write_text(json.dumps(self._asked), "utf-8")
        written.replace(self._file)
      except OSError:
        written.unlink(missing_ok=True)  # As the cache itself: the run does without.

  def _load(self, key, options, devices):
    options = xla_client.CompileOptions.ParseFromString(options)
    return self._plain(key, options, devices[0].client, devices)

  def _get(self, key, options, backend, devices, *more):
    """In place of JAX's: (executable or None, seconds that it took to compile)."""
    plain, said, ids = self._plain, options.SerializeAsString(), [d.id for d in devices]
    begun = time.perf_counter()
    found = None
    if not any(more) and key in self._coming:
      own_options, own_ids, made = self._coming.pop(key)
      ahead = (own_options, own_ids) == (said, ids) and not made.cancel()
      found = made.result() if ahead else None
      if ahead and found[0] is not None:
        self._note(key, said, ids)
        return found
    found = plain(key, options, backend, devices, *more)
    if found[0] is None or time.perf_counter() - begun > LEAST_SECONDS:
      self._note(key, said, ids)
    return found

  def _note(self, key, options, ids):
    said = base64.b64encode(options).decode()
    self._asked[key] = {"options": said, "devices": ids}


def _read(file):
  """{key: {"options", "devices"}} of the last start; {} where there was none."""
  try:
    return json.loads(file.read_text("utf-8"))
  except (OSError, ValueError):
    return {}
