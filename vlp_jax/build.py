"""From a config to the things it names: data, tokenizer, model, optimiser, evaluators."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from vlp_jax import config as config_lib
from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.models import vlm

# Fields of the whole model that its towers share, unless they name their own.
SHARED = ("backend", "dtype", "remat", "unroll")


@dataclasses.dataclass(frozen=True)
class Clock:
  """Turns durations into steps of this run.

  Attributes:
    batch_size: examples a step. epoch_size: examples an epoch. total: steps of the run.
  """

  batch_size: int
  epoch_size: int
  total: int = 0

  def steps(self, duration: int | str) -> int:
    return config_lib.steps(
      duration,
      batch_size=self.batch_size,
      epoch_size=self.epoch_size,
      total_steps=self.total,
    )


def clock(config: config_lib.Run, epoch_size: int) -> Clock:
  """The clock of a run over a source of `epoch_size` examples."""
  start = Clock(config.batch_size, epoch_size)
  return dataclasses.replace(start, total=start.steps(config.total))


def component(
  seam: str,
  spec: Mapping[str, Any],
  where: str,
  *,
  default: str | None = None,
  given: Mapping[str, Any] | None = None,
  time: Clock | None = None,
) -> Any:
  """An instance of the class that `spec["type"]` names, with the fields of `spec`.

  Args:
    seam: folder of the package, e.g. "objectives" or "data.sources".
    spec: `dict(type=…, field=…)` of a config.
    where: path of `spec` in the config, for messages.
    default: the type where the spec names none.
    given: values for fields that the config does not repeat (vocabulary, widths);
      those that the class does not have are left out, those of the spec win.
    time: resolves fields that are durations into steps.
  """
  spec = dict(spec)
  cls = config_lib.resolve(seam, spec.pop("type", default), where=where)
  config_lib.check_fields(cls, spec, where, given=given or {})
  fields = config_lib.fields(cls)
  merged = {k: v for k, v in (given or {}).items() if k in fields} | spec
  for name, value in merged.items():
    if config_lib.is_duration(fields[name]) and time is not None:
      merged[name] = time.steps(value)
  return cls(**merged)


def source(spec: Mapping[str, Any], where: str = "data.source") -> Any:
  """The source of examples that the config names."""
  return component("data.sources", spec, where)


def tokenizer(spec: Mapping[str, Any]) -> Any:
  """The tokenizer that the config names; its vocabulary comes before any model."""
  return component("data.tokenizers", spec, "tokenizer")


def model(spec: Mapping[str, Any], *, vocab: Any, length: int) -> vlm.VLM:
  """The model: an image tower, a text tower, and what fuses them.

  Args:
    spec: `config.model`.
    vocab: the tokenizer's vocabulary.
    length: the tokenizer's length, of which the position table gets as many rows
      unless the config asks for more.
  """
  spec = dict(spec)
  shared = {key: spec[key] for key in SHARED if key in spec}
  towers = {
    key: dict(spec.pop(key)) for key in ("image", "text", "fusion") if spec.get(key)
  }
  spec.pop("fusion", None)
  for name in ("image", "text"):
    if name not in towers:
      raise ValueError(f"config: model.{name} is missing: name an encoder.")
  image = component(
    "models", towers["image"], "model.image", default="vit", given=shared
  )
  words = shared | dict(vocab=vocab, length=length)
  text = component("models", towers["text"], "model.text", default="text", given=words)
  fusion = None
  if "fusion" in towers:
    sizes = shared | dict(num_heads=text.num_heads, mlp_dim=text.mlp_dim)
    fusion = component("models.fusion", towers["fusion"], "model.fusion", given=sizes)
  config_lib.check_fields(
    vlm.VLM, spec, "model", given=dict(image=image, text=text, fusion=fusion)
  )
  return vlm.VLM(image=image, text=text, fusion=fusion, **spec)


def pretrainer(
  config: config_lib.Run, *, vocab: Any, length: int, time: Clock
) -> pretrainer_lib.Pretrainer:
  """Model and objectives of a run.

  Args:
    config: the run's.
    vocab, length: of the tokenizer.
    time: for the durations that objectives have.
  """
  built = model(config.model, vocab=vocab, length=length)
  objectives, weights = {}, {}
  for name, spec in config.objectives.items():
    spec = dict(spec)
    weights[name] = float(spec.pop("weight", 1.0))
    objectives[name] = component(
      "objectives",
      spec,
      f"objectives.{name}",
      default=name,
      given=dict(vocab=vocab, width=built.text.width),
      time=time,
    )
    _check_teacher(name, objectives[name], config.ema_decay)
  if not objectives:
    raise ValueError("config: objectives is empty: name at least one, e.g. itc.")
  return pretrainer_lib.Pretrainer(built, objectives, weights)


def _check_teacher(name: str, objective: Any, ema_decay: float | None) -> None:
  """Fields that want a teacher, where the run has none."""
  wanted = [f for f in ("queue", "distill") if getattr(objective, f, 0)]
  if wanted and ema_decay is None:
    raise ValueError(
      f"config: objectives.{name}.{wanted[0]} wants a teacher: set ema_decay, e.g. 0.995."
    )
