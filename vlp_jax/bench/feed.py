"""Real batches for a benchmark of the step, as the trainer reads them."""

import contextlib
import pathlib
import tempfile

import ml_collections

from vlp_jax import batch as batch_lib
from vlp_jax import config as config_lib
from vlp_jax import job as job_lib
from vlp_jax.bench import program as program_lib
from vlp_jax.data import columns as columns_lib
from vlp_jax.data import pipeline
from vlp_jax.training import sharding
from vlp_jax.training import timing


def open_feed(
  given: ml_collections.ConfigDict, stack: contextlib.ExitStack
) -> tuple[program_lib.Program, timing.Waiting]:
  """(the program of a config, its batches on the device); the stack ends them."""
  folder = stack.enter_context(tempfile.TemporaryDirectory())
  config = config_lib.run(given)
  if config.accumulate != 1:
    raise ValueError(
      f"bench: accumulate={config.accumulate}: what is timed is a step that is one"
      " program: set --config.accumulate=1 and --batch_size to the microbatch's."
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
  fitting = batch_lib.check(job, batches)
  ahead = timing.Waiting(sharding.prefetch(fitting, job.mesh))
  return program_lib.of_job(job), ahead
