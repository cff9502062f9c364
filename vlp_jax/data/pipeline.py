"""Batches of a run, addressed by position; tf.data reads, decodes and augments ahead.

Position p of a run is example `index(p)`: a stateless permutation of (seed, epoch). What
is random about it (crop, caption) is drawn from (seed, p). So any step can be asked for
at once, on any number of processes, and nothing about data is in a checkpoint.

Shape letters: B batch, R side of the image, L text length.
"""

from collections.abc import Iterator
import collections
import dataclasses
import logging
import os
import threading
from typing import Any

import numpy as np
import tensorflow as tf

from vlp_jax.data import ops_image
from vlp_jax.data import pp as pp_lib

_log = logging.getLogger("vlp_jax")

# TensorFlow only reads data: it must not take a GPU's memory from the trainer.
tf.config.set_visible_devices([], "GPU")

SEEN_AT_LEAST = 100  # before the share of broken records counts
ATTEMPTS = 20  # substitutes for one broken record
NAMED = 5  # broken records of a kind that the log names


class BadDataError(ValueError):
  """Too many records are broken."""


class Bad:
  """Counts records that were passed over, names some, and knows when to stop.

  Attributes:
    counts: {reason: number}.
  """

  def __init__(self, most: float):
    self.counts = collections.Counter()
    self._most = most
    self._seen = 0
    self._keys = []
    self._lock = threading.Lock()

  def good(self, count: int) -> None:
    with self._lock:
      self._seen += count

  def add(self, key: str, error: ops_image.BadRecordError) -> None:
    """Counts one.

    Raises:
      BadDataError: more than the share that is allowed are broken.
    """
    with self._lock:
      self._seen += 1
      self.counts[error.reason] += 1
      self._keys.append(key)
      total = sum(self.counts.values())
      if self.counts[error.reason] <= NAMED:
        _log.warning("data: passed over %s: %s", key, error)
      if self._seen >= SEEN_AT_LEAST and total > self._most * self._seen:
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.counts.items())
        raise BadDataError(
          f"data: {total} of {self._seen} records are broken ({reasons}), more than"
          f" data.max_bad={self._most}; among them {', '.join(self._keys[:5])}. Mend or"
          " remove them, or raise data.max_bad."
        )


@dataclasses.dataclass(frozen=True)
class _Loader:
  """From positions to a host batch; every method is a function of its arguments."""

  source: Any
  op: pp_lib.Op
  tokenizer: Any
  seed: int
  bad: Bad

  def batch(self, positions: np.ndarray, indices: np.ndarray) -> dict[str, np.ndarray]:
    """The examples `indices`, which stand at `positions` of the run."""
    raw = self.source.read(indices)
    rows = [self._good(int(p), r) for p, r in zip(positions, raw, strict=True)]
    ids, mask = self.tokenizer.encode([row["caption"] for row in rows])
    self.bad.good(len(rows))
    return {
      "image": stack(rows),
      "text": ids,
      "text_mask": mask,
      "image_id": np.array([row["image_id"] for row in rows], np.int32),
    }

  def _good(self, position, raw):
    """The example of this record, or of the first of its substitutes that is whole."""
    for attempt in range(ATTEMPTS):
      rng = np.random.default_rng((self.seed, position, attempt))
      if attempt:
        (raw,) = self.source.read(rng.integers(len(self.source), size=1))
      try:
        captions = raw["captions"]
        choice = int(rng.integers(len(captions))) if len(captions) > 1 else 0
        return _example(raw, captions[choice] if captions else "", self.op, rng)
      except ops_image.BadRecordError as error:
        self.bad.add(raw["key"], error)
    raise BadDataError(
      f"data: {ATTEMPTS} records in a row are broken, the last is {raw['key']}:"
      f" {', '.join(self.bad.counts)}."
    )


def train_batches(
  source: Any,
  pp: str,
  tokenizer: Any,
  *,
  batch_size: int,
  seed: int,
  start: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  max_bad: float = 0.01,
  workers: int | None = None,
) -> "TrainBatches":
  """Endless batches from position `start` of the run on.

  Args:
    source: `len(source)`, `source.read(indices)`.
    pp: words of preprocessing; see `pp.py`.
    tokenizer: `encode(list of captions) -> (ids int32 [B, L], mask bool [B, L])`.
    batch_size: of the whole run; a process yields its rows of each batch.
    seed: of order and augmentation.
    start: a multiple of batch_size.
    process_index, process_count: of `jax.distributed`.
    max_bad: share of broken records beyond which iterating raises BadDataError.
    workers: batches that are prepared at once; None: by the number of cores.

  Returns:
    Iterator of {"image": uint8 [B, R, R, 3], "text": int32 [B, L], "text_mask": bool
    [B, L], "image_id": int32 [B]}; its `bad` counts the records passed over.

  Raises:
    ValueError: pp is wrong, or the batch does not split over the processes.
  """
  op = pp_lib.parse(pp)
  if batch_size % process_count:
    raise ValueError(
      f"config: batch_size={batch_size} is not a multiple of {process_count} processes."
    )
  bad = Bad(max_bad)
  loader = _Loader(source, op, tokenizer, seed, bad)
  rows = batch_size // process_count
  first = process_index * rows
  size = len(source)
  names = ("image", "text", "text_mask", "image_id")
  types = (tf.uint8, tf.int32, tf.bool, tf.int32)
  errors = []

  def load(positions, indices):
    try:
      batch = loader.batch(positions, indices)
    except Exception as error:  # tf.data would hand on its text alone
      errors.append(error)
      raise
    return tuple(batch[name] for name in names)

  def step(begin):
    positions = begin + first + tf.range(rows, dtype=tf.int64)
    return tf.numpy_function(load, (positions, shuffled(positions, size, seed)), types)

  steps = tf.data.Dataset.range(start, tf.int64.max, batch_size)
  parallel = workers or max(1, min(8, (os.cpu_count() or 2) // 2))
  options = tf.data.Options()
  options.deterministic = True
  options.threading.private_threadpool_size = parallel + 1
  data = steps.map(step, num_parallel_calls=parallel).prefetch(2).with_options(options)
  return TrainBatches(data, names, bad.counts, errors)


class TrainBatches:
  """The iterator of `train_batches`; `bad` is {reason: number} so far."""

  def __init__(self, data, names, bad, errors):
    self._iterator = data.as_numpy_iterator()
    self._names = names
    self._errors = errors
    self.bad = bad

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    try:
      return dict(zip(self._names, next(self._iterator), strict=True))
    except tf.errors.OpError:
      if self._errors:
        raise self._errors[0] from None
      raise


def shuffled(positions: tf.Tensor, size: int, seed: int) -> tf.Tensor:
  """int64 [n]: the example at each position; every epoch is another permutation."""
  epochs, at = positions // size, positions % size
  if size == 1:
    return tf.zeros_like(positions)
  # The op itself: its Python wrapper pads a seed for each index along the wrong axis.
  run = tf.fill(tf.shape(epochs), tf.constant(seed, tf.int64))
  return tf.raw_ops.RandomIndexShuffle(
    index=at,
    seed=tf.stack([run, epochs, tf.zeros_like(run)], axis=1),
    max_index=tf.constant(size - 1, tf.int64),
  )


def stack(rows: list[dict[str, Any]]) -> np.ndarray:
  """uint8 [B, R, R, 3] of the rows' images."""
  shapes = {row["image"].shape for row in rows}
  if len(shapes) > 1:
    raise ValueError(
      f"config: data.pp leaves images of different sizes, {sorted(shapes)[:3]}: end it"
      " with a word that makes them equal, e.g. resize(64)."
    )
  return np.stack([row["image"] for row in rows])


# --- Evaluation: every example, in order ------------------------------------------------


def eval_images(
  source: Any, pp: str, *, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
  """Images in the source's order, the last batch filled up with its first row.

  Yields:
    image uint8 [B, R, R, 3], image_id int32 [B], example_index int32 [B] and valid bool
    [B], false for what fills up.

  Raises:
    ValueError: a record is broken: an evaluation leaves none out by itself.
  """
  op = pp_lib.parse(pp)
  for indices, raw in _chunks(source, batch_size):
    rows = [_strict(r, "a", op) for r in raw]
    yield _filled({"image": stack(rows), **_ids(rows, indices)}, batch_size)


def eval_texts(
  source: Any, tokenizer: Any, *, batch_size: int
) -> Iterator[dict[str, Any]]:
  """All captions of all examples, in order, those of one example together.

  Yields:
    text int32 [B, L], text_mask bool [B, L], image_id int32 [B], valid bool [B], and
    caption, a list of B texts.
  """
  waiting: list[tuple[str, int]] = []
  for _, raw in _chunks(source, batch_size):
    for record in raw:
      texts = [_text(t) for t in record["captions"]]
      waiting += [(text, record["image_id"]) for text in texts]
    while len(waiting) >= batch_size:
      yield _texts(waiting[:batch_size], tokenizer, batch_size)
      waiting = waiting[batch_size:]
  if waiting:
    yield _texts(waiting, tokenizer, batch_size)


def eval_pairs(
  source: Any, pp: str, tokenizer: Any, *, batch_size: int
) -> Iterator[dict[str, Any]]:
  """Each example with its first caption; what `eval_images` and `eval_texts` yield."""
  op = pp_lib.parse(pp)
  for indices, raw in _chunks(source, batch_size):
    rows = [_strict(r, r["captions"][0] if r["captions"] else "", op) for r in raw]
    captions = [row["caption"] for row in rows]
    ids, mask = tokenizer.encode(captions)
    batch = {"image": stack(rows), "text": ids, "text_mask": mask}
    batch = _filled(batch | _ids(rows, indices), batch_size)
    yield batch | {"caption": captions + captions[:1] * (batch_size - len(captions))}


def _chunks(source, batch_size):
  for start in range(0, len(source), batch_size):
    indices = np.arange(start, min(start + batch_size, len(source)))
    yield indices, source.read(indices)


def _ids(rows, indices):
  ids = np.array([row["image_id"] for row in rows], np.int32)
  return {"image_id": ids, "example_index": indices.astype(np.int32)}


def _texts(pairs, tokenizer, batch_size):
  captions = [text for text, _ in pairs]
  ids, mask = tokenizer.encode(captions)
  image_id = np.array([image for _, image in pairs], np.int32)
  batch = _filled({"text": ids, "text_mask": mask, "image_id": image_id}, batch_size)
  return batch | {"caption": captions + captions[:1] * (batch_size - len(captions))}


def _filled(batch, batch_size):
  """The batch with its first row repeated to `batch_size`, and `valid`."""
  count = len(batch["image_id"])
  more = batch_size - count
  batch = {
    key: np.concatenate([value, np.repeat(value[:1], more, axis=0)])
    for key, value in batch.items()
  }
  return batch | {"valid": np.arange(batch_size) < count}


def _strict(raw, caption, op):
  try:
    return _example(raw, caption, op, np.random.default_rng(0))
  except ops_image.BadRecordError as error:
    raise ValueError(
      f"evaluation: {raw['key']} is broken ({error}), and an official protocol leaves no"
      " example out: mend the file, or take it out of the data."
    ) from error


def _example(raw, caption, op, rng):
  """{"image": uint8 [R, R, 3], "caption": text, "image_id"} of a raw record."""
  example = {"image": raw["image"], "caption": _text(caption)}
  if not example["caption"].strip():
    raise ops_image.BadRecordError("empty caption")
  example = op(example, rng)
  if not example["caption"].strip():
    raise ops_image.BadRecordError("empty caption", "after cleaning")
  return example | {"image_id": raw["image_id"]}


def _text(caption):
  if isinstance(caption, bytes):
    try:
      return caption.decode("utf-8")
    except UnicodeDecodeError as error:
      raise ops_image.BadRecordError("caption is not UTF-8", str(error)) from error
  try:
    caption.encode("utf-8")  # a table read with surrogates for bytes that are not
  except UnicodeEncodeError as error:
    raise ops_image.BadRecordError("caption is not UTF-8", str(error)) from error
  return caption
