"""A run of which a process gets stuck, as by a disk that does not answer any more.

STUCK: the process, and where: "1 written" is stuck in what it writes in the background
of its second save, "1 save" in that save itself, "1 evaluation" in what it reads for
its first evaluation, after a batch.
"""

import os
import threading
from typing import NoReturn

import orbax.checkpoint as ocp

from vlp_jax import train
from vlp_jax.data import evaluation


def hang() -> NoReturn:
  print("is stuck", flush=True)
  while True:
    threading.Event().wait()


class Stuck:
  """Of orbax, what is written in the background."""

  def result(self, timeout=None):
    hang()


def stick_in_the_second_save(where):
  handler = ocp.JsonCheckpointHandler
  save, count = handler.async_save, 0

  async def async_save(self, *args, **kwargs):
    nonlocal count
    count += 1
    begun = await save(self, *args, **kwargs)
    if count == 2 and where == "save":
      hang()
    return [*begun, Stuck()] if count == 2 else begun

  handler.async_save = async_save


def stick_in_an_evaluation():
  images = evaluation.eval_images

  def eval_images(*args, **kwargs):
    yield next(images(*args, **kwargs))
    hang()

  evaluation.eval_images = eval_images


def main():
  index, where = os.environ["STUCK"].split()
  if index == os.environ["VLP_JAX_PROCESS_ID"]:
    if where == "evaluation":
      stick_in_an_evaluation()
    else:
      stick_in_the_second_save(where)
  train.main()


if __name__ == "__main__":
  main()
