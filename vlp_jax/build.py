"""From a config to what it names: data, tokenizer, model, objectives, optimiser."""

from collections.abc import Mapping
import pathlib
import tempfile
from typing import Any

from etils import epath
import numpy as np

from vlp_jax import clock as clock_lib
from vlp_jax import config as config_lib
from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax import schema
from vlp_jax.data.tokenizers import sentencepiece
from vlp_jax.models import vlm
from vlp_jax.training import distributed
from vlp_jax.training import optim as optim_lib

# Fields of the whole model that its towers share, unless they name their own.
SHARED = ("backend", "dtype", "remat", "unroll")
TOWERS = ("image", "text", "fusion", "decoder", "codebook")


def component(
  seam: str,
  spec: Mapping[str, Any],
  where: str,
  *,
  default: str | None = None,
  given: Mapping[str, Any] | None = None,
  time: clock_lib.Clock | None = None,
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
  cls = schema.resolve(seam, spec.pop("type", default), where=where)
  schema.check_fields(cls, spec, where, given=given or {})
  fields = schema.fields(cls)
  merged = {k: v for k, v in (given or {}).items() if k in fields} | spec
  for name, value in merged.items():
    if schema.is_duration(fields[name]) and time is not None:
      merged[name] = time.steps(value)
  return cls(**merged)


def source(spec: Mapping[str, Any], where: str = "data.source") -> Any:
  """The source of examples that the config names."""
  return component("data.sources", spec, where)


def tokenizer(spec: Mapping[str, Any], source: Any, workdir: epath.Path) -> Any:
  """The tokenizer that the config names; its vocabulary comes before any model.

  With `train=dict(vocab_size=…, model_type=…)` it is a SentencePiece model made of the
  captions of the training source, once, and kept in the workdir.
  """
  spec = dict(spec)
  recipe = spec.pop("train", None)
  if recipe is not None:
    if spec.get("path") or spec.get("type") != "sentencepiece":
      raise ValueError(
        "config: tokenizer.train makes a vocabulary of the captions: say type="
        '"sentencepiece" and no path with it.'
      )
    spec["path"] = str(_trained_tokenizer(source, workdir, recipe))
  return component("data.tokenizers", spec, "tokenizer")


def _trained_tokenizer(source, workdir, recipe):
  """The file of it on a disk; made, where the workdir has none."""
  kept = workdir / "tokenizer.model"
  remote = "://" in str(kept)
  scratch = tempfile.mkdtemp(prefix="vlp_jax") if remote else workdir
  path = pathlib.Path(scratch, kept.name)

  def make():
    if remote and kept.exists():
      path.write_bytes(kept.read_bytes())
      return
    captions = source.captions(np.arange(len(source)))
    sentencepiece.train(captions, path, **recipe)
    if remote:
      kept.write_bytes(path.read_bytes())

  distributed.made_once(path, make)
  return path


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
  towers = {key: dict(spec.pop(key)) for key in TOWERS if spec.get(key)}
  for name in TOWERS:
    spec.pop(name, None)
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
    sizes["image_width"] = image.width
    sizes["text_width"] = text.width
    fusion = component("models.fusion", towers["fusion"], "model.fusion", given=sizes)
  built = dict(image=image, text=text, fusion=fusion)
  if "decoder" in towers:
    built["decoder"] = component(
      "models", towers["decoder"], "model.decoder", default="text", given=words
    )
  if "codebook" in towers:
    built["codebook"] = component(
      "models.codebooks", towers["codebook"], "model.codebook", given=shared
    )
  schema.check_fields(vlm.VLM, spec, "model", given=built)
  return vlm.VLM(**built, **spec)


def pretrainer(
  config: config_lib.Run, *, vocab: Any, length: int, time: clock_lib.Clock
) -> pretrainer_lib.Pretrainer:
  """Model and objectives of a run.

  Args:
    config: the run's.
    vocab, length: of the tokenizer.
    time: for the durations that objectives have.
  """
  built = model(config.model, vocab=vocab, length=length)
  width = pooled_width = built.text.width
  if built.fusion is not None:
    width, pooled_width = built.fusion.widths(width)
  objectives, weights, shares, kinds = {}, {}, {}, {}
  for name, spec in config.objectives.items():
    spec = dict(spec)
    weights[name] = float(spec.pop("weight", 1.0))
    if "share" in spec:
      shares[name] = _share(spec.pop("share"), name)
    if "kind" in spec:
      kinds[name] = spec.pop("kind")
    objectives[name] = component(
      "objectives",
      spec,
      f"objectives.{name}",
      default=name,
      given=dict(vocab=vocab, width=width, pooled_width=pooled_width),
      time=time,
    )
    _check_teacher(name, spec, config.ema_decay)
  if not objectives:
    raise ValueError("config: objectives is empty: name at least one, e.g. itc.")
  return pretrainer_lib.Pretrainer(
    built, objectives, weights, shares=shares, kinds=kinds
  )


def _share(share, name):
  if not share > 0:
    raise ValueError(
      f"config: objectives.{name}.share={share}: want more than 0; to leave the"
      f" objective out, say objectives.{name}=None."
    )
  return float(share)


def _check_teacher(name, spec, ema_decay):
  """Fields that want a teacher, where the run has none."""
  wanted = [field for field in ("queue", "distill") if spec.get(field)]
  if wanted and ema_decay is None:
    raise ValueError(
      f"config: objectives.{name}.{wanted[0]} wants a teacher: set ema_decay, e.g."
      " 0.995."
    )


def optim(
  spec: Mapping[str, Any], time: clock_lib.Clock | None = None
) -> optim_lib.Optim:
  """The optimiser's fields; its durations are steps where there is a clock."""
  return component("", spec, "optim", default="vlp_jax.training.optim:Optim", time=time)
