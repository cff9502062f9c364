"""What a reader is told, and how it serves rounds of so many images."""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import json
import os
import pathlib
import sys
from typing import Any

from vlp_jax.bench import timing

# Batches that a reader may hold: ours of two cores 4, DataLoader's 4, and one more.
AHEAD = 5


@dataclasses.dataclass(frozen=True)
class Work:
  """The first argument of a reader, as JSON.

  Attributes:
    folder: of .jpg files, with table.jsonl and images.tar of them.
    images: of a round. batch_size, res: of a batch.
    workers: threads or processes that decode; 1: in one core and one process.
    by: what decodes, where there is a choice.
  """

  folder: str
  images: int
  batch_size: int
  res: int
  workers: int
  by: str = "pillow"

  @property
  def files(self) -> list[pathlib.Path]:
    return sorted(pathlib.Path(self.folder).glob("*.jpg"))


def said() -> Work:
  """The work of this process; with one worker it keeps to one core."""
  work = Work(**json.loads(sys.argv[1]))
  if work.workers == 1 and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  return work


def forever(make: Callable[[], Iterable[Any]]) -> Iterator[Any]:
  """Epoch after epoch."""
  while True:
    yield from make()


def serve(work: Work, batches: Iterator[Any], **about: Any) -> None:
  """Serves rounds of `work.images` images, of batches that have a length.

  What was prepared between two rounds is taken first and not timed: from then on, as
  many images are prepared as are taken.
  """
  timed = timing.here(lambda: _take(batches, work.images))

  def once():
    _take(batches, AHEAD * work.batch_size)
    return timed()

  timing.serve(about, once)


def _take(batches, images):
  while images > 0:
    images -= len(next(batches))
