"""From raw records to a host batch: caption, image, columns, and what is broken.

Shape letters: B batch, R side of the image, L text length.
"""

import collections
from collections.abc import Iterable
import dataclasses
import logging
import os
from typing import Any

import numpy as np

from vlp_jax.data import columns as columns_lib
from vlp_jax.data import generators
from vlp_jax.data import ops_image
from vlp_jax.data import pp as pp_lib

_log = logging.getLogger("vlp_jax")

SEEN_AT_LEAST = 100  # before the share of broken records counts
ATTEMPTS = 20  # substitutes for one broken record
NAMED = 5  # broken records of a kind that the log and the error name


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


@dataclasses.dataclass(frozen=True)
class Loader:
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
    rows, images = [], Images(len(raw))
    # Each stands for (seed, position, attempt).
    rngs = generators.default_rngs(self.seed, positions, 0)
    for position, record, rng in zip(positions, raw, rngs, strict=True):
      row = self._good(int(position), record, rng, broken)
      if self.holds != "texts":
        images.add(row.pop("image"))
      rows.append(row)
    batch = {}
    if self.holds != "texts":
      batch["image"] = images.all
    if self.holds != "images":
      captions = [row["caption"] for row in rows]
      batch["text"], batch["text_mask"] = self.tokenizer.encode(captions)
    batch["image_id"] = np.array([row["image_id"] for row in rows], np.int32)
    batch |= sizes(rows)
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

  def _good(self, position, raw, rng, broken):
    """The example of this record, or of the first of its substitutes that is whole."""
    for attempt in range(ATTEMPTS):
      if attempt:
        rng = np.random.default_rng((self.seed, position, attempt))
        (raw,) = self._read(rng.integers(len(self.source), size=1))
      try:
        captions = raw["captions"]
        choice = int(rng.integers(len(captions))) if len(captions) > 1 else 0
        caption = captions[choice] if captions else ""
        example = example_of(raw, caption, self.op, rng, self.holds)
        return in_order(example | self.columns.example(raw, self.op, rng))
      except ops_image.BadRecordError as error:
        broken.append((raw["key"], error))
    last = "; ".join(f"{key}: {error}" for key, error in broken[-NAMED:])
    raise BadDataError(
      f"data: {ATTEMPTS} records that were tried for one place are all broken. The"
      f" last: {last}. Is this the right data.source?"
    )


# --- One example ----------------------------------------------------------------------


def example_of(raw, caption, op, rng, holds="pairs"):
  """{"image": uint8 [R, R, 3], "caption": text, "image_id"} of a raw record.

  An image alone has no words, a text alone has no "image".
  """
  if holds == "images":
    example = op({"image": _bytes(raw), "caption": ""}, rng)
    return example | {"image_id": raw["image_id"]}
  image = {} if holds == "texts" else {"image": _bytes(raw)}
  example = op(image | {"caption": text_of(caption)}, rng)
  if not example["caption"].strip():
    raise ops_image.BadRecordError("empty caption", "after cleaning")
  return example | {"image_id": raw["image_id"]}


def in_order(row):
  """The row, its two images in the order that its caption speaks of (`swap_sides`)."""
  if not row.get("swapped"):
    return row
  pairs = [("image", "image2"), ("image_size", "image2_size")]
  places = [pair for pair in pairs if pair[0] in row]
  return row | {a: row[b] for one, two in places for a, b in ((one, two), (two, one))}


def image_of(raw, op):
  # Words on captions have nothing to do here.
  example = op({"image": _bytes(raw), "caption": ""}, np.random.default_rng(0))
  return example | {"image_id": raw["image_id"]}


def caption_of(raw, caption, op):
  """(as the source has it, as `op` leaves it)."""
  text = text_of(caption)
  return text, op({"caption": text}, np.random.default_rng(0))["caption"]


def _bytes(raw):
  if raw.get("error"):
    raise ops_image.BadRecordError(raw["error"])
  return raw["image"]


def text_of(caption):
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
  images = Images(len(rows))
  for row in rows:
    images.add(row["image"])
  return images.all


class Images:
  """The images of a batch; each is copied there while it is in the processor's cache.

  Attributes:
    all: uint8 [B, R, R, 3], or float32 [B, N, W] of regions.
  """

  def __init__(self, count: int):
    self.all = np.zeros(0, np.uint8)
    self._count, self._added = count, 0

  def add(self, image: np.ndarray) -> None:
    """The next one.

    Raises:
      ValueError: it has another shape than those before.
    """
    if not self._added:
      self.all = np.empty((self._count, *image.shape), image.dtype)
    elif image.shape != self.all.shape[1:]:
      raise ValueError(
        "config: data.pp leaves images of different sizes,"
        f" {sorted({image.shape, self.all.shape[1:]})}: end it with a word that makes"
        " them equal, e.g. resize(64)."
      )
    self.all[self._added] = image
    self._added += 1


def sizes(rows):
  if "image_size" not in rows[0]:
    return {}
  return {"image_size": np.stack([row["image_size"] for row in rows])}


def cores():
  """Those that this process may use."""
  try:
    return len(os.sched_getaffinity(0))
  except AttributeError:  # not on Linux
    return os.cpu_count() or 1
