"""vlp_jax's input pipeline; by="turbo" or "pillow"."""

import contextlib

import numpy as np

from vlp_jax.bench.readers import work as work_lib
from vlp_jax.data import pipeline
from vlp_jax.data.sources import table


class NoWords:
  """A tokenizer that reads nothing: this is about images."""

  def encode(self, captions):
    shape = (len(captions), 1)
    return np.zeros(shape, np.int32), np.ones(shape, bool)


def batches(work: work_lib.Work) -> pipeline.TrainBatches:
  """As the trainer has them."""
  return pipeline.train_batches(
    table.Source(path=f"{work.folder}/table.jsonl"),
    words(work),
    NoWords(),
    batch_size=work.batch_size,
    seed=0,
    workers=work.workers,
  )


def words(work: work_lib.Work) -> str:
  """The pp string."""
  return f"decode|random_resized_crop({work.res}, by={work.by!r})|flip"


def main() -> None:
  work = work_lib.said()
  # Closed before the process ends: TensorFlow may wait for ever for threads in Python.
  with contextlib.closing(batches(work)) as made:
    made.open()
    images = (batch["image"] for batch in made)
    work_lib.serve(work, images, pp=words(work))


if __name__ == "__main__":
  main()
