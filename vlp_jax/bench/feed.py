"""Real batches for a benchmark of the step, as the trainer reads them."""

import contextlib
import pathlib
import tempfile

import ml_collections

from vlp_jax import batch as batch_lib
from vlp_jax import config as config_lib
from vlp_jax import job as job_lib
from vlp_jax.bench import program
from vlp_jax.data import columns as columns_lib
from vlp_jax.data import pipeline
from vlp_jax.training import sharding
from vlp_jax.training import timing


def open_feed(
  spec: str, given: ml_collections.ConfigDict, stack: contextlib.ExitStack
) -> tuple[job_lib.Job, timing.Waiting]:
  """(the job of a config, its batches on the device); the stack ends them."""
  folder = stack.enter_context(tempfile.TemporaryDirectory())
  config = config_lib.run(given)
  program.check(config, spec)
  if config.data.kinds:
    raise ValueError(
      f"bench: {spec}: data.kinds ({', '.join(config.data.kinds)}): with --real, a step"
      " reads pairs alone: leave --real out."
    )
  job = job_lib.make(config, pathlib.Path(folder))
  objectives = job.pretrainer.objectives
  batches = pipeline.train_batches(
    job.source,
    config.data.pp,
    job.tokenizer,
    batch_size=config.batch_size,
    seed=config.seed,
    max_bad=config.data.max_bad,
    workers=config.data.workers,
    block=config.data.block,
    columns=columns_lib.of(objectives, res=job.pretrainer.model.image.res),
  )
  stack.enter_context(contextlib.closing(batches))
  batch_lib.check(job, batches.sample())
  batches.open()
  return job, timing.Waiting(sharding.prefetch(batches, job.mesh))
