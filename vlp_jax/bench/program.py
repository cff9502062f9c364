"""The train step of any config, with synthetic batches: no files and no TensorFlow."""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

import jax
import ml_collections

from vlp_jax import card as card_lib
from vlp_jax import config as config_lib
from vlp_jax import config_file
from vlp_jax import job as job_lib
from vlp_jax.training import program as program_lib
from vlp_jax.training import sharding as sharding_lib
from vlp_jax.training import step as step_lib
from vlp_jax.training import stepping as stepping_lib

# Examples of an epoch, where no card says: durations in epochs need some number.
_EPOCH = 1_000_000


def given(
  spec: str, overrides: Sequence[str] = (), *, batch_size: int | None = None
) -> ml_collections.ConfigDict:
  """The config, with a batch size over its own."""
  config = config_file.load(spec, overrides)
  if batch_size is not None:
    config.batch_size = batch_size
  return config


def load(
  spec: str,
  overrides: Sequence[str] = (),
  *,
  batch_size: int | None = None,
  vocabulary: int | None = None,
) -> job_lib.Job:
  """The job of a config, on the devices that are here and without its data.

  Of several kinds of data, its step is one that reads all.

  Args:
    spec: "FILE[:arg]". overrides: "--config.a.b=value".
    batch_size: instead of the config's.
    vocabulary: number of words; None: that of the config's card, configs/cards/.

  Raises:
    ValueError, FileNotFoundError: the config is not as it must be, or has no card and
      no vocabulary was said.
  """
  config = config_lib.run(given(spec, overrides, batch_size=batch_size))
  check(config, spec)
  config_lib.check(config)
  examples = _EPOCH
  if vocabulary is None:
    card = _card(spec)
    vocabulary, examples = card.vocabulary, card.examples
  mesh = sharding_lib.make_mesh(sharding_lib.Sharding(**config.sharding))
  sharding_lib.check_batch(config.batch_size, mesh)
  job = job_lib.shapes(
    config,
    mesh,
    vocab=card_lib.stand_in(vocabulary, config.tokenizer),
    length=config.tokenizer["length"],
    examples=examples,
  )
  return dataclasses.replace(job, turns=None)


def check(config: config_lib.Run, spec: str) -> None:
  """That a step of the run is one program.

  Raises:
    ValueError: it is not.
  """
  if config.accumulate != 1:
    raise ValueError(
      f"bench: {spec}: accumulate={config.accumulate}: what is timed is a step that is"
      " one program: set --config.accumulate=1 and --batch_size to the microbatch's."
    )


def step(job: job_lib.Job) -> Any:
  """The pure function, not jitted and not guarded."""
  return step_lib.make_train_step(
    job.pretrainer,
    job.tx,
    seed=job.config.seed,
    ema_decay=job.config.ema_decay,
    schedule=job.schedule,
  )


def whole(
  job: job_lib.Job,
  *,
  donate: bool = True,
  options: Mapping[str, Any] | None = None,
) -> program_lib.Program:
  """The step as the trainer jits it: the state donated, everything in its place.

  Args:
    donate: False: the state is not, which no run does. options: of the compiler.
  """
  given = (step(job), job.abstract_state, job.readings, job.mesh)
  (made,) = stepping_lib.Whole(*given).programs
  if not donate:
    places = jax.tree.map(lambda x: x.sharding, job.abstract_state)
    out = (places, sharding_lib.replicated(job.mesh))
    made = dataclasses.replace(made, fn=jax.jit(step(job), out_shardings=out))
  return dataclasses.replace(made, options=options)


def lower(job: job_lib.Job, *, donate: bool = True) -> jax.stages.Lowered:
  """`whole`, lowered."""
  made = whole(job, donate=donate)
  with sharding_lib.use(job.mesh, job.sharding):
    return made.lower()


def _card(spec):
  """The card of configs/NAME.py, from NAME."""
  name = pathlib.Path(spec.partition(":")[0]).stem
  try:
    return card_lib.read(card_lib.folder() / "cards" / f"{name}.toml")
  except FileNotFoundError as error:
    raise FileNotFoundError(
      f"bench: {spec} has no card that says the size of its vocabulary: say"
      " --vocabulary=N."
    ) from error
