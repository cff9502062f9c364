"""CLIP, SigLIP and SigLIP 2 of Hugging Face's transformers <-> our dual encoders.

All have the same towers under the same names; they differ in their ends. What the
weights do not tell (activation, epsilon, heads) is in config.json, and is checked
against the model.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import os
from typing import Any

import numpy as np

from vlp_jax.interop import dual
from vlp_jax.interop import hf
from vlp_jax.interop import made_with
from vlp_jax.interop import rules
from vlp_jax.interop import towers
from vlp_jax.models import naflex

SIGNATURE = (
  r"vision_model\.encoder\.layers\.0\.self_attn\.q_proj\.weight",
  r"text_model\.encoder\.layers\.0\.self_attn\.q_proj\.weight",
  r"logit_scale",
)
# What transformers leaves out of config.json where it is the default of the class
# (configuration_clip.py, configuration_siglip.py), here in the words of its files.
_CLIP = hf.BASE | dict(hidden_act="quick_gelu", layer_norm_eps=1e-5)
_SIGLIP = hf.BASE | dict(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)
_SIGLIP_TEXT = _SIGLIP | dict(max_position_embeddings=64, vocab_size=32_000)
DEFAULTS = {
  "clip": dict(
    text_config=_CLIP
    | dict(
      hidden_size=512,
      intermediate_size=2048,
      num_attention_heads=8,
      max_position_embeddings=77,
      vocab_size=49_408,
    ),
    vision_config=_CLIP | dict(image_size=224, patch_size=32),
    projection_dim=512,
  ),
  "siglip": dict(
    text_config=_SIGLIP_TEXT,
    vision_config=_SIGLIP | dict(image_size=224, patch_size=16),
  ),
  # configuration_siglip2.py: a row of patches in place of an image.
  "siglip2": dict(
    text_config=_SIGLIP_TEXT,
    vision_config=_SIGLIP | dict(patch_size=16, num_patches=256),
  ),
}
# Their class of each kind.
CLASSES = dict(clip="CLIPModel", siglip="SiglipModel", siglip2="Siglip2Model")
# Ours <- theirs, of either tower.
SIZES = dict(
  width="hidden_size",
  depth="num_hidden_layers",
  num_heads="num_attention_heads",
  mlp_dim="intermediate_size",
  norm_eps="layer_norm_eps",
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What a directory holds: params, a tree of ours; config, of config.json."""

  params: dict[str, Any]
  config: dict[str, Any]


def load(path: str | os.PathLike) -> Checkpoint:
  """Reads a directory, or a name of the hub; weights keep the file's types.

  Raises:
    FileNotFoundError, ValueError: a file is missing; the model is no CLIP or SigLIP;
      see `hf.read` and `rules.from_theirs`.
  """
  directory = hf.read(path)
  config, spec = directory.config, _spec(directory.config, directory.path)
  params = LAYOUTS[config["model_type"]].read(
    directory.tensors,
    directory.path,
    num_heads_image=spec["image"]["num_heads"],
    num_heads_text=spec["text"]["num_heads"],
  )
  return Checkpoint(params, config)


def save(path: str | os.PathLike, checkpoint: Checkpoint) -> None:
  """Writes a directory that `from_pretrained` of the class reads (`CLASSES`)."""
  kind = _kind(checkpoint.config, "what to write")
  hf.write(path, checkpoint.config, LAYOUTS[kind].write(checkpoint.params))


def model_spec(path: str | os.PathLike) -> dict[str, Any]:
  """What `c.model` has to say for the model of a folder.

  `model.text.vocab` is not in it: a tokenizer brings it, of config.json's vocab_size.

  Raises:
    FileNotFoundError, ValueError: no config.json, of another model, or of a field that
      our towers do not have.
  """
  return _spec(hf.config(path), path)


def of_model(model: Any, params: Mapping[str, Any]) -> Checkpoint:
  """A model of ours as one of theirs; what is `dual.BESIDE` the towers is left out.

  Args:
    model: the `VLM`: config.json says its fields. Its text encoder's vocabulary tells
      the special ids.
    params: its pretrainer's, arrays without boxes.

  Raises:
    ValueError: the model is neither of them, or has a field that they do not have.
  """
  kind = "siglip" if model.image.pool == "map" else "clip"
  if isinstance(model.image, naflex.Encoder):
    kind = "siglip2"
  config = _describe(model, kind)
  # A reader must understand what we write as this model.
  spec = _spec(config, kind)
  made_with.check(model, _told(spec), f"a {CLASSES[kind]}")
  return Checkpoint(dual.towers_of(params), config)


def export(params: Mapping[str, Any], kind: str) -> dict[str, np.ndarray]:
  """A tree of the parameters' shape (gradients) under transformers' names.

  kind: "clip", "siglip" or "siglip2".
  """
  return LAYOUTS[kind].write(params)


def init(
  abstract_params: Mapping[str, Any],
  *,
  path: str | os.PathLike,
  skip: Sequence[str] = (),
  fresh: Sequence[str] = (),
  model: Any = None,
) -> dict[str, Any]:
  """Parameters of a model: `c.init = dict(type="hf_dual", path=FOLDER)`.

  Args:
    abstract_params, skip, fresh: see `clip.init`.
    path: as of `load`.
    model: the `VLM`: what config.json says beside sizes must hold for it.

  Raises:
    FileNotFoundError, ValueError: one error that lists all that does not fit.
  """
  directory = hf.read(path)
  config, where = directory.config, directory.path
  spec = _spec(config, where)
  made_with.check(model, _told(spec), where)
  return LAYOUTS[config["model_type"]].fit(
    lambda: directory.tensors, where, abstract_params, skip=skip, fresh=fresh
  )


def clip_rules(depth_image: int, depth_text: int) -> rules.Table:
  """`CLIPModel` <-> {"model": …} (sizes of `towers`, E embedding)."""
  vision = "vision_model."
  return [
    *_vision_rules(vision, depth_image, prefix=1),
    rules.Rule(f"{vision}embeddings.class_embedding", "model/image/cls", "W -> W"),
    *towers.norm_rules(f"{vision}pre_layrnorm.", "model/image/norm_pre", "W"),
    *_text_rules("text_model.", depth_text),
    rules.Rule("visual_projection.weight", "model/image_proj/kernel", "E W -> W E"),
    rules.Rule("text_projection.weight", "model/text_proj/kernel", "E D -> D E"),
    rules.Rule("logit_scale", "model/log_scale", "->"),
  ]


def siglip_rules(depth_image: int, depth_text: int) -> rules.Table:
  """`SiglipModel` <-> {"model": …, "objectives_itc": …} (sizes of `towers`, E)."""
  return _siglip_rules(depth_image, depth_text, "W 3 p q -> (p q 3) W")


def siglip2_rules(depth_image: int, depth_text: int) -> rules.Table:
  """`Siglip2Model`, whose patches are rows: a linear map in place of a convolution."""
  return _siglip_rules(depth_image, depth_text, "W K -> K W")


def _siglip_rules(depth_image, depth_text, patches):
  vision, head = "vision_model.", "vision_model.head."
  pool = "model/image/map_pool"
  return [
    *_vision_rules(vision, depth_image, prefix=0, patches=patches),
    rules.Rule(
      f"{vision}embeddings.patch_embedding.bias", "model/image/patch/bias", "W -> W"
    ),
    rules.Rule(f"{head}probe", f"{pool}/probe", "1 1 W -> 1 W"),
    *towers.fused_attention_rules(f"{head}attention.", f"{pool}/attn"),
    *towers.norm_rules(f"{head}layernorm.", f"{pool}/norm", "W"),
    *towers.linear_rules(f"{head}mlp.fc1.", f"{pool}/mlp/up", "W", "G"),
    *towers.linear_rules(f"{head}mlp.fc2.", f"{pool}/mlp/down", "G", "W"),
    *_text_rules("text_model.", depth_text),
    *towers.linear_rules("text_model.head.", "model/text_proj", "D", "E"),
    rules.Rule("logit_scale", "model/log_scale", "1 ->"),
    rules.Rule("logit_bias", dual.BIAS, "1 ->"),
  ]


def layer_rules(theirs: str, ours: str, depth: int) -> rules.Table:
  """`CLIPEncoderLayer` (sizes W G M h)."""
  layers = range(depth)
  layer, blocks = f"{theirs}encoder.layers.{{i}}.", f"{ours}/blocks"
  table = [
    *towers.norm_rules(f"{layer}layer_norm1.", f"{blocks}/norm_attn", "W", layers)
  ]
  attn = f"{layer}self_attn."
  for name, letter in (("query", "q"), ("key", "k"), ("value", "v")):
    linear, leaf = f"{attn}{letter}_proj.", f"{blocks}/attn/{name}"
    table += [
      rules.Rule(f"{linear}weight", f"{leaf}/kernel", "(M h) W -> W M h", layers),
      rules.Rule(f"{linear}bias", f"{leaf}/bias", "(M h) -> M h", layers),
    ]
  out, leaf = f"{attn}out_proj.", f"{blocks}/attn/out"
  return [
    *table,
    rules.Rule(f"{out}weight", f"{leaf}/kernel", "W (M h) -> M h W", layers),
    rules.Rule(f"{out}bias", f"{leaf}/bias", "W -> W", layers),
    *towers.norm_rules(f"{layer}layer_norm2.", f"{blocks}/norm_mlp", "W", layers),
    *towers.linear_rules(f"{layer}mlp.fc1.", f"{blocks}/mlp/up", "W", "G", layers),
    *towers.linear_rules(f"{layer}mlp.fc2.", f"{blocks}/mlp/down", "G", "W", layers),
  ]


def _vision_rules(theirs, depth, *, prefix, patches="W 3 p q -> (p q 3) W"):
  at, ours = f"{theirs}embeddings.", "model/image"
  return [
    rules.Rule(
      f"{at}position_embedding.weight",
      f"{ours}/posemb",
      "L W -> L W",
      fit=towers.resize_to(prefix),
    ),
    rules.Rule(f"{at}patch_embedding.weight", f"{ours}/patch/kernel", patches),
    *layer_rules(theirs, ours, depth),
    *towers.norm_rules(f"{theirs}post_layernorm.", f"{ours}/norm", "W"),
  ]


def _text_rules(theirs, depth):
  at, ours = f"{theirs}embeddings.", "model/text"
  blocks = layer_rules(theirs, ours, depth)
  return [
    *towers.table_rules(
      f"{at}token_embedding.weight", f"{at}position_embedding.weight", ours
    ),
    *rules.relabel(blocks, towers.TEXT_LETTERS),
    *towers.norm_rules(f"{theirs}final_layer_norm.", f"{ours}/norm", "D"),
  ]


_COMMON = dict(
  image_layer="vision_model.encoder.layers.{i}.",
  text_layer="text_model.encoder.layers.{i}.",
  image_norm="vision_model.post_layernorm.weight",
  text_norm="text_model.final_layer_norm.weight",
  # 0, 1, 2, …: files of before transformers 4.31 have them.
  unused=(r"(text|vision)_model\.embeddings\.position_ids",),
)
LAYOUTS = {
  "clip": dual.layout("a CLIPModel", clip_rules, **_COMMON),
  "siglip": dual.layout("a SiglipModel", siglip_rules, **_COMMON),
  "siglip2": dual.layout("a Siglip2Model", siglip2_rules, **_COMMON),
}


def _kind(config, where):
  kind = config.get("model_type")
  if kind not in LAYOUTS:
    raise ValueError(f"{where}: model_type={kind!r}: want one of {', '.join(LAYOUTS)}.")
  return kind


def _spec(config, where):
  kind = _kind(config, where)
  text, vision = (_section(config, name) for name in ("text_config", "vision_config"))
  image = _tower(vision, f"{where}: vision_config")
  words = _tower(text, f"{where}: text_config")
  image |= dict(patch=vision["patch_size"]) | _picture(kind, vision, where)
  words |= dict(type="text", length=text["max_position_embeddings"], types=0)
  words |= dict(norm="pre", pool="last")
  spec = dict(image=image, text=words, scale="log_scale")
  if kind == "clip":
    image |= dict(norm_pre=True, patch_bias=False, pool="first")
    words |= dict(attention="causal", see_padding=False)
    width = config.get("projection_dim", DEFAULTS[kind]["projection_dim"])
    return spec | dict(embed_dim=width, project_bias=False)
  if not vision.get("vision_use_head", True):
    raise ValueError(f"{where}: vision_use_head=false: only the pooling head is read.")
  image |= dict(pool="map") | (dict(class_token=False) if kind == "siglip" else {})
  words |= dict(attention="bidirectional", see_padding=True)
  width = text.get("projection_size", text["hidden_size"])
  return spec | dict(
    embed_dim=width, project=("text",), image_mean=(0.5,) * 3, image_std=(0.5,) * 3
  )


def _picture(kind, vision, where):
  """Type and res of the image tower."""
  if kind != "siglip2":
    return dict(type="vit", res=vision["image_size"])
  side = math.isqrt(vision["num_patches"])
  if side * side != vision["num_patches"]:
    raise ValueError(
      f"{where}: vision_config.num_patches={vision['num_patches']}: want a square: its"
      " table of positions is of a square grid."
    )
  return dict(type="naflex", res=side * vision["patch_size"])


def _section(config, name):
  """One tower's part of config.json, with what it leaves out."""
  return DEFAULTS[config["model_type"]][name] | (config.get(name) or {})


def _tower(theirs, where):
  """Fields of a tower of ours."""
  act = hf.activation(theirs, where)
  if theirs.get("num_channels", 3) != 3:
    raise ValueError(f"{where}.num_channels={theirs['num_channels']}: want 3.")
  return {ours: theirs[name] for ours, name in SIZES.items()} | dict(act=act)


# Other sizes than the model's are told by the shapes, which may be resized.
_BY_SHAPE = ("type", "res", "length")


def _told(spec):
  """{"model.image.act": value} of a spec, less what the tensors' shapes tell."""
  found = {}
  for key, value in spec.items():
    if isinstance(value, dict):
      found |= {f"model.{key}.{k}": v for k, v in value.items() if k not in _BY_SHAPE}
    elif key not in ("image_mean", "image_std"):
      found[f"model.{key}"] = tuple(value) if isinstance(value, list) else value
  return found


def _describe(model, kind):
  """config.json of a model of ours."""

  def tower(module):
    fields = {theirs: getattr(module, ours) for ours, theirs in SIZES.items()}
    return fields | dict(
      hidden_act=hf.their_activation(module.act), attention_dropout=0.0
    )

  vocab = model.text.vocab
  text = tower(model.text) | dict(
    model_type=f"{kind}_text_model",
    max_position_embeddings=model.text.length,
    vocab_size=vocab.size,
    bos_token_id=vocab.cls,
    eos_token_id=vocab.sep,
    pad_token_id=vocab.pad,
  )
  vision = tower(model.image) | dict(
    model_type=f"{kind}_vision_model", patch_size=model.image.patch, num_channels=3
  )
  side = model.image.res // model.image.patch
  vision |= (
    dict(num_patches=side**2) if kind == "siglip2" else dict(image_size=model.image.res)
  )
  config = dict(
    architectures=[CLASSES[kind]],
    model_type=kind,
    initializer_factor=1.0,
    dtype="float32",
  )
  if kind == "clip":
    width = model.embed_dim
    config["projection_dim"] = width
    text["projection_dim"] = vision["projection_dim"] = width
  else:
    text["projection_size"] = model.embed_dim
    vision["vision_use_head"] = True
  return config | dict(text_config=text, vision_config=vision)
