"""Batches of a run, addressed by position; tf.data reads, decodes and augments ahead.

Position p of a run is an example by a stateless permutation of (seed, epoch), and what
is random about it (crop, caption) is drawn from (seed, p). So any step can be asked for
at once, on any number of processes, and nothing about data is in a checkpoint.

The first batches are made without TensorFlow, which takes two seconds to import: it is
imported while the first steps run.

Shape letters: B batch, R side of the image, L text length.
"""

from collections.abc import Iterator
from concurrent import futures
import dataclasses
import functools
import threading
from typing import Any, Literal
import weakref

import numpy as np

from vlp_jax import memory
from vlp_jax.data import columns as columns_lib
from vlp_jax.data import pp as pp_lib
from vlp_jax.data import records
from vlp_jax.data import shuffle

SAMPLE = 8  # examples that are looked at before anything else
EARLY = 2  # pieces that are made before TensorFlow's import begins
TOGETHER = 4_096  # rows whose examples are found at once: of each by itself it is slow


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
      `training/microbatch.py` cuts a batch.

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
  if pp_lib.swaps(pp) and "image2" not in more.specs:
    raise ValueError(
      f"config: data.pp={pp!r}: swap_sides wants two images, and no objective asks for"
      " a second: say objectives.classify.images=2, or leave it out."
    )
  loader = records.Loader(source, op, tokenizer, seed, more, holds)
  order = Order(len(source), seed, block, start, batch_size, rows)
  parallel = workers or max(1, min(8, records.cores() // 2))
  return TrainBatches(loader, order, records.Bad(max_bad), parallel)


@dataclasses.dataclass(frozen=True)
class Order:
  """Which examples stand where.

  Attributes:
    size: examples of the source. seed, block, start, batch_size: of `train_batches`.
    rows: int64 [pieces, rows of a piece], those of each batch.
  """

  size: int
  seed: int
  block: int
  start: int
  batch_size: int
  rows: np.ndarray

  def piece(self, number: int) -> tuple[np.ndarray, np.ndarray]:
    """(positions, examples), int64 [n] each, of the piece of a number."""
    # Of one epoch: each has a permutation of its own.
    together = max(1, min(TOGETHER, self.size) // self.rows.shape[1])
    positions, examples = self._found(number // together, together)
    return positions[number % together], examples[number % together]

  @functools.cached_property
  def _found(self):
    # Workers ask for neighbours: few are kept.
    return functools.lru_cache(maxsize=4)(self._find)

  def _find(self, which, together):
    """(positions, examples), int64 [pieces, n] each, of a run of pieces."""
    numbers = which * together + np.arange(together)
    begins = self.start + numbers // len(self.rows) * self.batch_size
    positions = begins[:, None] + self.rows[numbers % len(self.rows)]
    moved = shuffle.shuffled(positions.ravel(), self.size, self.seed, block=self.block)
    return positions, moved.reshape(positions.shape)


class TrainBatches:
  """The iterator of `train_batches`, to be closed or to be dropped after use.

  Attributes:
    bad: {reason: number} of broken records in the batches so far.
  """

  def __init__(
    self,
    loader: records.Loader,
    order: Order,
    bad: records.Bad,
    parallel: int,
  ):
    """Args: parallel: pieces prepared at once."""
    self._loader, self._order, self._parallel = loader, order, parallel
    # Pieces by their numbers. TensorFlow is given these alone: it would copy a batch.
    self._loaded: dict[int, Any] = {}
    self._bad = bad
    self.bad = bad.counts
    self._iterator = None
    self._next = 0  # number of the piece
    self._end = lambda: None

  def sample(self) -> dict[str, np.ndarray]:
    """A few examples from all over the source, as batches have them.

    Needs no TensorFlow and begins nothing: mistakes show in it, and shapes.
    """
    count = min(SAMPLE, self._order.size, self._order.rows.size)
    indices = np.linspace(0, self._order.size - 1, count).astype(np.int64)
    batch, _ = self._loader.batch(self._order.start + np.arange(count), indices)
    return batch

  def open(self) -> None:
    """Begins to read ahead by tf.data, unless that has begun."""
    if self._iterator is not None:
      return
    tf = tensorflow()
    more_wanted = tf.Variable(True, trainable=False)
    # Not a method: what TensorFlow keeps must not keep this object.
    load = functools.partial(_load, self._loader, self._order, self._loaded)
    step = lambda number: tf.numpy_function(load, (number,), tf.int64)
    options = tf.data.Options()
    options.deterministic = True
    options.threading.private_threadpool_size = self._parallel + 1
    steps = tf.data.Dataset.range(self._next, tf.int64.max)
    steps = steps.take_while(lambda _: more_wanted.read_value())
    data = steps.map(step, num_parallel_calls=self._parallel).prefetch(2)
    self._iterator = data.with_options(options).as_numpy_iterator()
    self._end = weakref.finalize(self, _end, self._iterator, more_wanted)

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    number = self._next
    if self._iterator is None and not is_here(wanted=number >= EARLY):
      _load(self._loader, self._order, self._loaded, number)
    else:
      self.open()
      number = int(next(self._iterator))
    self._next = number + 1
    found = self._loaded.pop(number)
    if isinstance(found, Exception):
      raise found
    batch, broken = found
    self._bad.add(len(batch["image_id"]), broken)
    return batch

  def close(self) -> None:
    """Ends what is being prepared; there are no batches after it."""
    if self._iterator is None:
      self._iterator = iter(())
    if ending := self._end():
      ending.join()
      self._loaded.clear()  # what nobody took


def _load(loader, order, loaded, number):
  """Puts a piece, or what went wrong with it, into `loaded`; its number."""
  try:
    loaded[int(number)] = loader.batch(*order.piece(int(number)))
  except Exception as error:  # TensorFlow would hand on its text alone
    loaded[int(number)] = error
  return number


@functools.cache
def tensorflow() -> Any:
  """The module, imported at the first call; it only reads data."""
  import tensorflow as tf

  # It must not take a GPU's memory from the trainer.
  tf.config.set_visible_devices([], "GPU")
  memory.keep_images()
  return tf


def is_here(*, wanted: bool) -> bool:
  """Whether TensorFlow is imported; if it is wanted, a thread begins to.

  Raises:
    ImportError: it cannot be.
  """
  if tensorflow.cache_info().currsize:
    return True
  if wanted and (coming := _importing()).done():
    coming.result()
    return True
  return False


@functools.cache
def _importing():
  """TensorFlow, from a thread."""
  thread = futures.ThreadPoolExecutor(1, "importing")
  coming = thread.submit(tensorflow)
  thread.shutdown(wait=False)
  return coming


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
  tf = tensorflow()
  more_wanted.assign(False)
  while True:
    try:
      next(iterator)
    except StopIteration:
      return
    except tf.errors.OpError:
      pass  # Of a batch that nobody wants.
