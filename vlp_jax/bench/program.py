"""The train step of any config, with synthetic batches: no files and no TensorFlow."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np
import optax

from vlp_jax import batch as batch_lib
from vlp_jax import build
from vlp_jax import card as card_lib
from vlp_jax import clock as clock_lib
from vlp_jax import config as config_lib
from vlp_jax import config_file
from vlp_jax import job as job_lib
from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.data import columns as columns_lib
from vlp_jax.data import pp
from vlp_jax.data import vocab as vocab_lib
from vlp_jax.ops import tree
from vlp_jax.planning import flops
from vlp_jax.planning import run as run_lib
from vlp_jax.training import optim as optim_lib
from vlp_jax.training import sharding as sharding_lib
from vlp_jax.training import step as step_lib


@dataclasses.dataclass(frozen=True)
class Program:
  """What a run computes again and again, without what it reads.

  Attributes:
    config: checked. pretrainer, tx, schedule, mesh, sharding: as of `job.Job`.
    batch: ShapeDtypeStructs of a global batch. vocab: of the synthetic words.
  """

  config: config_lib.Run
  pretrainer: pretrainer_lib.Pretrainer
  tx: optax.GradientTransformation
  schedule: Any
  mesh: jax.sharding.Mesh
  sharding: sharding_lib.Sharding
  batch: Mapping[str, jax.ShapeDtypeStruct]
  vocab: vocab_lib.Vocab

  @functools.cached_property
  def abstract_state(self) -> step_lib.TrainState:
    return step_lib.abstract_state(
      self.pretrainer,
      self.tx,
      self.batch,
      ema=self.config.ema_decay is not None,
      mesh=self.mesh,
      sharding=self.sharding,
    )

  def parameters(self) -> int:
    return tree.size(self.abstract_state.params)

  def state(self) -> step_lib.TrainState:
    """A fresh one."""
    return step_lib.init_state(
      self.pretrainer,
      self.tx,
      self.batch,
      seed=self.config.seed,
      ema=self.config.ema_decay is not None,
      mesh=self.mesh,
      sharding=self.sharding,
      where=self.abstract_state,
    )

  def step(self) -> Any:
    """The pure function, not jitted."""
    return step_lib.make_train_step(
      self.pretrainer,
      self.tx,
      seed=self.config.seed,
      ema_decay=self.config.ema_decay,
      schedule=self.schedule,
    )

  def lower(self) -> jax.stages.Lowered:
    """The step as the trainer jits it: the state donated, everything in its place."""
    places = jax.tree.map(lambda x: x.sharding, self.abstract_state)
    whole = sharding_lib.replicated(self.mesh)
    jitted = jax.jit(self.step(), donate_argnums=0, out_shardings=(places, whole))
    split = sharding_lib.put_batch(self.host_batch(), self.mesh)
    with sharding_lib.use(self.mesh, self.sharding):
      return jitted.lower(self.abstract_state, split)

  def host_batch(self, seed: int = 0) -> dict[str, np.ndarray]:
    """Noise for images, any words of full length, and what the objectives want."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, spec in self.batch.items():
      shape, dtype = spec.shape, spec.dtype
      if dtype == np.bool_:
        out[name] = np.ones(shape, bool)
      elif dtype == np.uint8:
        out[name] = rng.integers(0, 256, shape, np.uint8)
      elif name == "image_id":
        out[name] = np.arange(shape[0], dtype=dtype)
      elif name.endswith("_size"):
        out[name] = np.full(shape, self.pretrainer.model.image.res, dtype)
      elif len(shape) == 2 and name.startswith("text"):
        ids = rng.integers(self.vocab.mask + 1, self.vocab.size, shape)
        ids[:, 0] = self.vocab.cls
        out[name] = ids.astype(dtype)
      else:
        out[name] = np.zeros(shape, dtype)
    return out

  def model_flops(self) -> int:
    """Of one step, without what rematerialisation computes again."""
    config = run_lib.nothing_twice(self.config)
    plain = dataclasses.replace(
      self, config=config, pretrainer=_pretrainer(config, self.vocab, _EPOCH)
    )
    return flops.count(plain.step(), self.abstract_state, dict(self.batch))


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
) -> Program:
  """The program of a config.

  Args:
    spec: "FILE[:arg]". overrides: "--config.a.b=value".
    batch_size: instead of the config's.
    vocabulary: number of words; None: that of the config's card, configs/cards/.

  Raises:
    ValueError, FileNotFoundError: the config is not as it must be, or has no card and
      no vocabulary was said.
  """
  config = config_lib.run(given(spec, overrides, batch_size=batch_size))
  config_lib.check(config)
  if config.accumulate != 1:
    raise ValueError(
      f"bench: {spec}: accumulate={config.accumulate}: what is timed is a step that is"
      " one program: set --config.accumulate=1 and --batch_size to the microbatch's."
    )
  examples = _EPOCH
  if vocabulary is None:
    card = _card(spec)
    vocabulary, examples = card.vocabulary, card.examples
  vocab = vocab_lib.Vocab(size=vocabulary, pad=0, unk=1, cls=2, sep=3, mask=4)
  sharding = sharding_lib.Sharding(**config.sharding)
  mesh = sharding_lib.make_mesh(sharding)
  sharding_lib.check_batch(config.batch_size, mesh)
  trained = _pretrainer(config, vocab, examples)
  batch = _batch(config, trained)
  time = clock_lib.of(config, examples)
  optim = build.optim(config.optim, time)
  params = step_lib.abstract_params(trained, batch)
  tx, schedule = optim_lib.make(optim, params, total_steps=time.total)
  return Program(config, trained, tx, schedule, mesh, sharding, batch, vocab)


def of_job(job: job_lib.Job) -> Program:
  """The program of a run whose data are there."""
  return Program(
    job.config,
    job.pretrainer,
    job.tx,
    job.schedule,
    job.mesh,
    job.sharding,
    job.batch,
    job.tokenizer.vocab,
  )


def _pretrainer(config, vocab, examples):
  time = clock_lib.of(config, examples)
  length = config.tokenizer["length"]
  return build.pretrainer(config, vocab=vocab, length=length, time=time)


def _batch(config, trained):
  """Shapes of a batch, with the sizes that padded images come with."""
  res, length = trained.model.image.res, config.tokenizer["length"]
  columns = columns_lib.of(trained.objectives, res=res)
  batch = batch_lib.spec(config.batch_size, res, length, columns=columns)
  return batch_lib.with_sizes(batch) if pp.leaves_sizes(config.data.pp) else batch


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
