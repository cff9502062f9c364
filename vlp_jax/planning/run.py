"""From a config to the run that is planned: vocabulary and examples from its card."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import jax
import ml_collections

from vlp_jax import build
from vlp_jax import card as card_lib
from vlp_jax import config as config_lib
from vlp_jax import job as job_lib
from vlp_jax.training import sharding as sharding_lib


@dataclasses.dataclass(frozen=True)
class Facts:
  """What a run's data would have told: ids of the vocabulary, examples of an epoch."""

  vocabulary: int
  examples: int


def facts(
  file: str,
  config: ml_collections.ConfigDict,
  *,
  vocabulary: int | None = None,
  examples: int | None = None,
) -> Facts:
  """As said, else as the config's own recipe of a vocabulary, else of its card.

  Args:
    file: of the config, "configs/albef.py:tiny". Its card is configs/cards/albef.toml.

  Raises:
    ValueError: there is no card, and something is not said.
  """
  recipe = config.get("tokenizer", {}).get("train") or {}
  said = dict(vocabulary=vocabulary or recipe.get("vocab_size"), examples=examples)
  missing = [name for name, value in said.items() if value is None]
  if missing:
    path = card_lib.of_config(file)
    if path is None:
      raise ValueError(
        f"plan: {file} has no card in configs/cards/ that knows its data: say"
        f" {' and '.join(f'--{name}=N' for name in missing)}."
      )
    card = card_lib.read(path)
    said |= {name: getattr(card, name) for name in missing}
  for name, value in said.items():
    if value < 1:
      raise ValueError(f"plan: --{name}={value}: want 1 or more.")
  return Facts(**said)


def job(
  config: config_lib.Run, known: Facts, devices: Sequence[jax.Device]
) -> tuple[job_lib.Job, str | None]:
  """The run on these devices, and a note where its mesh is of the planner's choice.

  Raises:
    ValueError: the config is not as it must be, or its batch does not split.
  """
  config_lib.check(config)
  note = None
  if not config.sharding.get("mesh"):
    mesh, note = default_mesh(config, len(devices))
    if mesh is not None:
      config = dataclasses.replace(config, sharding=config.sharding | dict(mesh=mesh))
  mesh = sharding_lib.make_mesh(
    sharding_lib.Sharding(**config.sharding), devices=list(devices)
  )
  sharding_lib.check_batch(config.batch_size, mesh)
  made = job_lib.shapes(
    config,
    mesh,
    vocab=card_lib.stand_in(known.vocabulary, config.tokenizer),
    length=config.tokenizer["length"],
    examples=known.examples,
  )
  return made, note


def default_mesh(
  config: config_lib.Run, devices: int
) -> tuple[dict[str, int] | None, str | None]:
  """A mesh for a batch that cannot be split over all devices, and why.

  Data takes as many devices as divide the batch; tensor, the others, where that
  divides the heads of every tower. (None, None): data takes all, as by default.
  """
  if config.batch_size % devices == 0:
    return None, None
  data = math.gcd(config.batch_size, devices)
  tensor = devices // data
  heads = [
    tower["num_heads"]
    for tower in config.model.values()
    if isinstance(tower, Mapping) and "num_heads" in tower
  ]
  if any(number % tensor for number in heads):
    return None, None  # The error of `check_batch` says what to do.
  mesh = dict(data=data, tensor=tensor)
  said = " ".join(f"--config.sharding.mesh.{a}={s}" for a, s in mesh.items())
  return mesh, (
    f"a batch of {config.batch_size} does not split over {devices} devices: the mesh is"
    f" data={data}, tensor={tensor}, as {said} would say"
  )


def with_fields(config: config_lib.Run, **fields: Any) -> config_lib.Run:
  """The config with `model` fields put over those of all towers, and others replaced.

  remat, dtype, backend, unroll go to the model; a tower that says its own follows.
  """
  model = dict(config.model)
  for name in build.SHARED:
    if name in fields:
      value = fields.pop(name)
      model[name] = value
      for tower in build.TOWERS:
        if isinstance(model.get(tower), Mapping) and name in model[tower]:
          model[tower] = {**model[tower], name: value}
  return dataclasses.replace(config, model=model, **fields)


def nothing_twice(config: config_lib.Run) -> config_lib.Run:
  """The config that computes nothing a second time to save memory."""
  objectives = {
    name: {**spec, "pieces": 1} if spec.get("type", name) == "lm" else spec
    for name, spec in config.objectives.items()
    if spec is not None
  }
  return with_fields(config, remat="none", backend="einsum", objectives=objectives)
