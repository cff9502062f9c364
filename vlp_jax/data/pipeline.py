"""Batches of a run, addressed by position; tf.data reads, decodes and augments ahead.

Position p of a run is an example by a stateless permutation of (seed, epoch), and what
is random about it (crop, caption) is drawn from (seed, p). So any step can be asked for
at once, on any number of processes, and nothing about data is in a checkpoint.

Shape letters: B batch, R side of the image, L text length.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
import dataclasses
import logging
import os
import threading
from typing import Any, Literal
import weakref

import numpy as np
import tensorflow as tf

from vlp_jax.data import columns as columns_lib
from vlp_jax.data import memory
from vlp_jax.data import ops_image
from vlp_jax.data import pp as pp_lib

_log = logging.getLogger("vlp_jax")

# TensorFlow only reads data: it must not take a GPU's memory from the trainer.
tf.config.set_visible_devices([], "GPU")
memory.keep()

SEEN_AT_LEAST = 100  # before the share of broken records counts
# Of the shuffle. TensorFlow's 4 leave data of a few thousand examples nearly in order
# (their correlation with it is 5 to 10 times that of chance), and 8 leave a trace in
# 60,000; after 16 none is found.
ROUNDS = 16
ATTEMPTS = 20  # substitutes for one broken record
NAMED = 5  # broken records of a kind that the log and the error name
COLUMNS = {
  "image": tf.uint8,
  "text": tf.int32,
  "text_mask": tf.bool,
  "image_id": tf.int32,
}


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
    self._keys = collections.defaultdict(list)

  def add(self, good: int, broken: Iterable[tuple[str, ops_image.BadRecordError]]):
    """Counts good records, and (key, error) of broken ones.

    Raises:
      BadDataError: more than the share that is allowed are broken.
    """
    self._seen += good
    for key, error in broken:
      self._seen += 1
      self.counts[error.reason] += 1
      total = sum(self.counts.values())
      if self.counts[error.reason] <= NAMED:
        self._keys[error.reason].append(key)
        _log.warning("data: passed over %s: %s", key, error)
      elif total in (100, 1_000, 10_000, 100_000, 1_000_000):
        _log.warning("data: passed over %s so far: %s", f"{total:,}", str(self))
      enough = self._seen >= SEEN_AT_LEAST or not self._most
      if enough and total > self._most * self._seen:
        named = [key for keys in self._keys.values() for key in keys]
        raise BadDataError(
          f"data: {total} of {self._seen} records are broken ({self}), more than"
          f" data.max_bad={self._most}; among them {', '.join(named[:NAMED])}. Mend or"
          " remove them, or raise data.max_bad."
        )

  def __str__(self) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in self.counts.most_common())


# --- Training: endless, shuffled ------------------------------------------------------


def train_batches(
  source: Any,
  pp: str,
  tokenizer: Any,
  *,
  batch_size: int,
  seed: int,
  start: int = 0,
  rows: np.ndarray | None = None,
  max_bad: float = 0.01,
  workers: int | None = None,
  block: int = 1,
  columns: columns_lib.Columns | None = None,
  holds: Literal["pairs", "images", "texts"] = "pairs",
  pieces: int = 1,
  runs: int = 1,
) -> "TrainBatches":
  """Endless batches from position `start` of the run on.

  Args:
    source: see sources/__init__.py.
    pp: words of preprocessing; see `pp.py`.
    tokenizer: `encode(list of captions) -> (ids int32 [B, L], mask bool [B, L])`.
    batch_size: of the whole run.
    seed: of order and augmentation, 0 or more.
    start: examples that the run has seen.
    rows: int [R], those of each batch that this process yields; None: all.
    max_bad: share of broken records beyond which iterating raises BadDataError.
    workers: batches that are prepared at once; None: by the number of cores.
    block: so many examples that lie side by side in the source stay together.
    columns: what a batch has beside these; None: nothing.
    holds: "images" reads no captions, and batches have no text; "texts" reads no
      images, pp has words on captions alone, and batches have no image.
    pieces, runs: a batch comes in so many pieces, one after the other. The process's
      rows are `runs` runs of neighbours, of each of which a piece has an equal part, as
      `training/accumulate.py` cuts a batch.

  Returns:
    Iterator of {"image": uint8 [B, R, R, 3], "text": int32 [B, L], "text_mask": bool
    [B, L], "image_id": int32 [B]}, the columns, and "image_size": int32 [B, 2] where
    pp pads.

  Raises:
    ValueError: pp is wrong, the source is empty, or rows are not of the batch.
  """
  op = pp_lib.parse_captions(pp) if holds == "texts" else pp_lib.parse(pp)
  if not len(source):
    raise ValueError("config: data.source has no examples.")
  if block < 1 or len(source) % block:
    raise ValueError(
      f"config: data.block={block} does not divide the {len(source)} examples of"
      " data.source."
    )
  if batch_size < 1:
    raise ValueError(f"config: batch_size={batch_size}: want 1 or more.")
  rows = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)
  if not len(rows) or not (0 <= rows.min() <= rows.max() < batch_size):
    raise ValueError(f"rows={rows.tolist()}: want some of 0 … {batch_size - 1}.")
  if seed < 0 or start < 0:
    raise ValueError(f"seed={seed}, start={start}: want 0 or more.")
  if len(rows) % (pieces * runs):
    raise ValueError(
      f"config: batch_size={batch_size}: the {len(rows)} rows of a process do not make"
      f" {pieces} pieces of {runs} runs."
    )
  rows = rows.reshape(runs, pieces, -1).swapaxes(0, 1).reshape(pieces, -1)
  more = columns or columns_lib.Columns()
  loader = _Loader(source, op, tokenizer, seed, more, holds)
  kinds = {key: t for key, t in COLUMNS.items() if key not in columns_lib.LACKS[holds]}
  kinds |= {name: tf.as_dtype(x.dtype) for name, x in more.empty().items()}
  if holds != "texts" and pp_lib.leaves_regions(pp):
    kinds["image"] = tf.float32
  loaded: dict[int, Any] = {}  # what is to be told of a piece, by its number
  more_wanted = tf.Variable(True, trainable=False)

  def load(number, positions, indices):
    try:
      batch, broken = loader.batch(positions, indices)
    except Exception as error:
      # tf.data would hand on its text alone, so an empty batch goes ahead of it.
      batch = {key: np.zeros(0, t.as_numpy_dtype) for key, t in kinds.items()}
      broken = error
    extra = {key: value for key, value in batch.items() if key not in kinds}
    loaded[int(number)] = broken, extra
    return tuple(batch[key] for key in kinds)

  def step(number):
    begin = start + number // pieces * batch_size
    positions = begin + tf.gather(tf.constant(rows, tf.int64), number % pieces)
    indices = shuffled(positions, len(source), seed, block=block)
    types = tuple(kinds.values())
    return number, tuple(tf.numpy_function(load, (number, positions, indices), types))

  parallel = workers or max(1, min(8, _cores() // 2))
  options = tf.data.Options()
  options.deterministic = True
  options.threading.private_threadpool_size = parallel + 1
  steps = tf.data.Dataset.range(tf.int64.max)
  steps = steps.take_while(lambda _: more_wanted.read_value())
  data = steps.map(step, num_parallel_calls=parallel).prefetch(2).with_options(options)
  return TrainBatches(data, loaded, Bad(max_bad), tuple(kinds), more_wanted)


class TrainBatches:
  """The iterator of `train_batches`, to be closed or to be dropped after use.

  Attributes:
    bad: {reason: number} of broken records in the batches so far.
  """

  def __init__(
    self,
    data: tf.data.Dataset,
    loaded: dict[int, Any],
    bad: Bad,
    names: tuple[str, ...],
    more_wanted: tf.Variable,
  ):
    self._iterator = data.as_numpy_iterator()
    self._end = weakref.finalize(self, _end, self._iterator, more_wanted)
    self._names = names
    self._loaded = loaded
    self._bad = bad
    self.bad = bad.counts

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    number, columns = next(self._iterator)
    broken, extra = self._loaded.pop(int(number))
    if isinstance(broken, Exception):
      raise broken
    batch = dict(zip(self._names, columns, strict=True)) | extra
    self._bad.add(len(batch["image_id"]), broken)
    return batch

  def close(self) -> None:
    """Ends what is being prepared; there are no batches after it."""
    if ending := self._end():
      ending.join()


def _end(iterator, more_wanted):
  """A thread that ends the iterator, or None at the end of the process.

  TensorFlow destroys an iterator with Python's lock held, and waits in it for its
  threads: were one of them in Python then, both would wait for ever. Garbage is found
  by any thread, also by one of those: none of them may wait here.
  """
  ending = threading.Thread(target=_drain, args=(iterator, more_wanted))
  try:
    ending.start()
  except RuntimeError:  # no more threads: the process ends
    _drain(iterator, more_wanted)
    return None
  return ending


def _drain(iterator, more_wanted):
  more_wanted.assign(False)
  while True:
    try:
      next(iterator)
    except StopIteration:
      return
    except tf.errors.OpError:
      pass  # Of a batch that nobody wants.


def shuffled(
  positions: tf.Tensor, size: int, seed: int, *, block: int = 1
) -> tf.Tensor:
  """int64 [n]: the example at each position; every epoch is another permutation.

  Runs of `block` examples, which divides `size`, are moved as one.
  """
  epochs, at = positions // size, positions % size
  if size == block:
    return tf.convert_to_tensor(at)
  # The op itself: its Python wrapper pads a seed for each index along the wrong axis.
  run = tf.fill(tf.shape(epochs), tf.constant(seed, tf.int64))
  moved = tf.raw_ops.RandomIndexShuffle(
    index=at // block,
    seed=tf.stack([run, epochs, tf.zeros_like(run)], axis=1),
    max_index=tf.constant(size // block - 1, tf.int64),
    rounds=ROUNDS,
  )
  return moved * block + at % block


@dataclasses.dataclass(frozen=True)
class _Loader:
  """From positions to a host batch; every method is a function of its arguments."""

  source: Any
  op: pp_lib.Op
  tokenizer: Any
  seed: int
  columns: columns_lib.Columns
  holds: str = "pairs"

  def batch(self, positions: np.ndarray, indices: np.ndarray):
    """The examples `indices`, which stand at `positions` of the run.

    Returns:
      the columns, and [(key, BadRecordError)] of the records that were passed over.
    """
    broken = []
    raw = self._read(indices)
    rows = [self._good(int(p), r, broken) for p, r in zip(positions, raw, strict=True)]
    batch = {}
    if self.holds != "texts":
      batch["image"] = stack(rows)
    if self.holds != "images":
      captions = [row["caption"] for row in rows]
      batch["text"], batch["text_mask"] = self.tokenizer.encode(captions)
    batch["image_id"] = np.array([row["image_id"] for row in rows], np.int32)
    batch |= _sizes(rows)
    return batch | self.columns.batch(rows, self.tokenizer), broken

  def _read(self, indices):
    """Raw examples; of texts, the captions alone, without images."""
    if self.holds != "texts":
      return self.source.read(indices)
    return [
      {
        "captions": self.source.captions(np.array([i])),
        "image_id": i % 2**31,
        "key": f"text {i}",
      }
      for i in map(int, indices)
    ]

  def _good(self, position, raw, broken):
    """The example of this record, or of the first of its substitutes that is whole."""
    for attempt in range(ATTEMPTS):
      rng = np.random.default_rng((self.seed, position, attempt))
      if attempt:
        (raw,) = self._read(rng.integers(len(self.source), size=1))
      try:
        captions = raw["captions"]
        choice = int(rng.integers(len(captions))) if len(captions) > 1 else 0
        caption = captions[choice] if captions else ""
        example = _example(raw, caption, self.op, rng, self.holds)
        return example | self.columns.example(raw, self.op, rng)
      except ops_image.BadRecordError as error:
        broken.append((raw["key"], error))
    last = "; ".join(f"{key}: {error}" for key, error in broken[-NAMED:])
    raise BadDataError(
      f"data: {ATTEMPTS} records that were tried for one place are all broken. The"
      f" last: {last}. Is this the right data.source?"
    )


# --- Evaluation: every example, in order ----------------------------------------------


def eval_images(
  source: Any,
  pp: str,
  *,
  batch_size: int,
  workers: int | None = None,
  sizes: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
  """Images in the source's order, the last batch filled up with its first row.

  Yields:
    image uint8 [B, R, R, 3], image_id int32 [B], example_index int32 [B] and valid bool
    [B], false for what fills up. With `sizes`, pp may pad: image_size int32 [B, 2].

  Raises:
    ValueError: a record is broken: an evaluation leaves none out by itself.
  """
  op = pp_lib.parse(pp) if sizes else _parse_square(pp)

  def load(indices):
    rows = [_strict(r, _image, op) for r in source.read(indices)]
    batch = {"image": stack(rows), **_sizes(rows), **_ids(rows, indices)}
    return _filled(batch, batch_size)

  return _ahead(load, _chunks(source, batch_size), workers)


def eval_texts(
  source: Any, pp: str, tokenizer: Any, *, batch_size: int
) -> Iterator[dict[str, Any]]:
  """All captions of all examples, in order, those of one example together.

  Args:
    source, tokenizer, batch_size: as of `train_batches`.
    pp: its words on captions are applied, those on images are not.

  Yields:
    text int32 [B, L], text_mask bool [B, L], image_id int32 [B], example_index int32
    [B], valid bool [B], and caption, a list of B texts as the source has them.

  Raises:
    ValueError: a record is broken.
  """
  op = pp_lib.parse_captions(pp)
  captions, columns = [], []

  def batch():
    ids, mask = tokenizer.encode([caption for _, caption in captions[:batch_size]])
    image_id, index = np.array(columns[:batch_size], np.int32).T
    full = _filled(
      {"text": ids, "text_mask": mask, "image_id": image_id, "example_index": index},
      batch_size,
    )
    return full | {"caption": _fill([raw for raw, _ in captions], batch_size)}

  for indices in _chunks(source, batch_size):
    for index, raw in zip(indices, source.read(indices), strict=True):
      for caption in raw["captions"] or [""]:
        captions.append(_strict(raw, _caption, caption, op))
        columns.append((raw["image_id"], index))
    while len(captions) >= batch_size:
      yield batch()
      del captions[:batch_size], columns[:batch_size]
  if captions:
    yield batch()


def eval_pairs(
  source: Any,
  pp: str,
  tokenizer: Any,
  *,
  batch_size: int,
  workers: int | None = None,
  columns: columns_lib.Columns | None = None,
  sizes: bool = False,
) -> Iterator[dict[str, Any]]:
  """Each example with its first caption: what `eval_images` and `eval_texts` yield.

  And the columns, if there are any.
  """
  op = pp_lib.parse(pp) if sizes else _parse_square(pp)
  more = columns or columns_lib.Columns()

  def load(indices):
    raw = source.read(indices)
    first = [r["captions"][0] if r["captions"] else "" for r in raw]
    rows = [
      _strict(r, _example, caption, op, np.random.default_rng(0))
      | _strict(r, more.example, op, np.random.default_rng(0))
      for r, caption in zip(raw, first, strict=True)
    ]
    ids, mask = tokenizer.encode([row["caption"] for row in rows])
    batch = {"image": stack(rows), "text": ids, "text_mask": mask, **_sizes(rows)}
    batch |= more.batch(rows, tokenizer)
    batch = _filled(batch | _ids(rows, indices), batch_size)
    return batch | {"caption": _fill([_text(c) for c in first], batch_size)}

  return _ahead(load, _chunks(source, batch_size), workers)


def _ahead(
  load: Callable[[np.ndarray], dict], chunks: Iterable[np.ndarray], workers: int | None
) -> Iterator[dict]:
  """`load` of each chunk in order, so many at once, and one that waits."""
  workers = workers or min(8, _cores())
  with futures.ThreadPoolExecutor(workers) as pool:
    waiting = collections.deque()
    try:
      for chunk in chunks:
        waiting.append(pool.submit(load, chunk))
        if len(waiting) > workers:
          yield waiting.popleft().result()
      while waiting:
        yield waiting.popleft().result()
    finally:
      for future in waiting:
        future.cancel()


def _parse_square(pp):
  """The op of a pp that leaves images whole."""
  if pp_lib.leaves_sizes(pp):
    raise ValueError(
      f"config: evaluation: pp={pp!r}: evaluators take images without padding: say"
      " resize(…) instead of fit(…)."
    )
  return pp_lib.parse(pp)


def _chunks(source, batch_size):
  for start in range(0, len(source), batch_size):
    yield np.arange(start, min(start + batch_size, len(source)))


def _sizes(rows):
  if "image_size" not in rows[0]:
    return {}
  return {"image_size": np.stack([row["image_size"] for row in rows])}


def _ids(rows, indices):
  ids = np.array([row["image_id"] for row in rows], np.int32)
  return {"image_id": ids, "example_index": indices.astype(np.int32)}


def _fill(values, batch_size):
  """The first `batch_size` of a list, or the list filled up with its first."""
  return (values + values[:1] * (batch_size - len(values)))[:batch_size]


def _filled(batch, batch_size):
  """The batch with its first row repeated to `batch_size`, and `valid`."""
  count = len(batch["image_id"])
  batch = {
    key: np.concatenate([value, np.repeat(value[:1], batch_size - count, axis=0)])
    for key, value in batch.items()
  }
  return batch | {"valid": np.arange(batch_size) < count}


def _strict(raw, function, *args):
  """`function(raw, *args)`, where a broken record is the user's error."""
  try:
    return function(raw, *args)
  except ops_image.BadRecordError as error:
    raise ValueError(
      f"evaluation: {raw['key']} is broken: {error}. An official protocol leaves no"
      " example out by itself: mend the record, or take it out of the data that the"
      " evaluation's data.source names."
    ) from error


# --- One example ----------------------------------------------------------------------


def _example(raw, caption, op, rng, holds="pairs"):
  """{"image": uint8 [R, R, 3], "caption": text, "image_id"} of a raw record.

  An image alone has no words, a text alone has no "image".
  """
  if holds == "images":
    example = op({"image": _bytes(raw), "caption": ""}, rng)
    return example | {"image_id": raw["image_id"]}
  image = {} if holds == "texts" else {"image": _bytes(raw)}
  example = op(image | {"caption": _text(caption)}, rng)
  if not example["caption"].strip():
    raise ops_image.BadRecordError("empty caption", "after cleaning")
  return example | {"image_id": raw["image_id"]}


def _image(raw, op):
  # Words on captions have nothing to do here.
  example = op({"image": _bytes(raw), "caption": ""}, np.random.default_rng(0))
  return example | {"image_id": raw["image_id"]}


def _caption(raw, caption, op):
  """(as the source has it, as `op` leaves it)."""
  text = _text(caption)
  return text, op({"caption": text}, np.random.default_rng(0))["caption"]


def _bytes(raw):
  if raw.get("error"):
    raise ops_image.BadRecordError(raw["error"])
  return raw["image"]


def _text(caption):
  """The caption as a str that is not empty."""
  try:
    if isinstance(caption, bytes):
      caption = caption.decode("utf-8")
    caption.encode("utf-8")  # a table may have been read with surrogates for bad bytes
  except UnicodeError as error:
    raise ops_image.BadRecordError("caption is not UTF-8", str(error)) from error
  if not caption.strip():
    raise ops_image.BadRecordError("empty caption")
  return caption


def stack(rows: list[dict[str, Any]]) -> np.ndarray:
  """uint8 [B, R, R, 3] of the rows' images, or float32 [B, N, W] of their regions."""
  shapes = {row["image"].shape for row in rows}
  if len(shapes) > 1:
    raise ValueError(
      f"config: data.pp leaves images of different sizes, {sorted(shapes)[:3]}: end it"
      " with a word that makes them equal, e.g. resize(64)."
    )
  return np.stack([row["image"] for row in rows])


def _cores():
  """Those that this process may use."""
  try:
    return len(os.sched_getaffinity(0))
  except AttributeError:  # not on Linux
    return os.cpu_count() or 1
