"""Folders of transformers: ViT, for the image tower of a model (LiT's, ALBEF's).

Such files have a pooler or a classifier as well, which no model of ours has.
"""

from collections.abc import Mapping, Sequence
import os
import re
from typing import Any

import numpy as np

from vlp_jax.interop import dual
from vlp_jax.interop import hf_folder
from vlp_jax.interop import rules
from vlp_jax.interop import towers

# google/vit-base-patch16-224 is a ViTForImageClassification: its tower has a prefix.
PREFIX = re.compile(r"^vit\.")
HEADS = (r"pooler\..*", r"classifier\..*")
# All of a model but the image tower.
ELSEWHERE = r"(?!model/image/).*"


def model_spec(path: str | os.PathLike) -> dict[str, Any]:
  """What `c.model.image` has to say for the tower of a folder."""
  config, where = hf_folder.config(path, ("vit",))
  if not config.get("qkv_bias", True):
    raise ValueError(f"{where}: qkv_bias=false: our towers have biases.")
  return dict(
    type="vit",
    width=config["hidden_size"],
    depth=config["num_hidden_layers"],
    num_heads=config["num_attention_heads"],
    mlp_dim=config["intermediate_size"],
    patch=config["patch_size"],
    res=config["image_size"],
    norm_eps=config["layer_norm_eps"],
    act=hf_folder.activation(config["hidden_act"], str(where)),
    class_token=True,
    norm="pre",
    norm_pre=False,
  )


def load(path: str | os.PathLike) -> dict[str, Any]:
  """{"model": {"image": …}, "pooler": …} of a folder of a ViTModel.

  Raises:
    FileNotFoundError, ValueError: see `hf_folder` and `rules.from_theirs`.
  """
  spec, tensors, where = _read(path)
  return rules.from_theirs(
    tensors,
    parameter_rules(spec["depth"], pooler=True),
    sizes=dict(M=spec["num_heads"]),
    what=f"{where}, as a ViTModel,",
  )


def export(params: Mapping[str, Any], *, patch: int) -> dict[str, np.ndarray]:
  """What `load` read, or the image tower alone, under transformers' names."""
  depth = params["model"]["image"]["blocks"]["norm_mlp"]["scale"].shape[0]
  table = parameter_rules(depth, pooler="pooler" in params)
  return rules.to_theirs(params, table, sizes=dict(p=patch, q=patch))


def init(
  abstract_params: Mapping[str, Any],
  *,
  path: str | os.PathLike,
  skip: Sequence[str] = HEADS,
  fresh: Sequence[str] = (ELSEWHERE,),
  model: Any = None,
) -> dict[str, Any]:
  """The image tower of a model: `c.init = dict(type="hf_vit", path=FOLDER)`.

  Args:
    abstract_params, skip, fresh: see `clip.init`; by default the file's heads are left
      out, and all but the image tower is drawn.
    path: folder with config.json and weights.
    model: the `VLM`: its activation, epsilon and heads must be those of config.json.

  Raises:
    FileNotFoundError, ValueError: one error that lists all that does not fit.
  """
  spec, tensors, where = _read(path)
  if model is not None:
    told = {f"model.image.{k}": v for k, v in spec.items() if k not in ("type", "res")}
    dual.check(told, dual.fields(model, told), str(where))
  return rules.from_theirs(
    tensors,
    parameter_rules(spec["depth"]),
    sizes=dict(M=spec["num_heads"]),
    shapes=abstract_params,
    skip=skip,
    fresh=fresh,
    what=f"{where}, as a ViTModel for this model,",
  )


def parameter_rules(depth: int, *, pooler: bool = False) -> rules.Table:
  """`ViTModel` <-> {"model": {"image": …}} (sizes of `towers`)."""
  layers, ours = range(depth), "model/image"
  layer, blocks = "encoder.layer.{i}.", f"{ours}/blocks"
  patches = "embeddings.patch_embeddings.projection."
  table = [
    rules.Rule("embeddings.cls_token", f"{ours}/cls", "1 1 W -> W"),
    rules.Rule(
      "embeddings.position_embeddings",
      f"{ours}/posemb",
      "1 L W -> L W",
      fit=towers.resize_to(1),
    ),
    rules.Rule(f"{patches}weight", f"{ours}/patch/kernel", "W 3 p q -> (p q 3) W"),
    rules.Rule(f"{patches}bias", f"{ours}/patch/bias", "W -> W"),
    *towers.norm_rules(f"{layer}layernorm_before.", f"{blocks}/norm_attn", "W", layers),
  ]
  for name in ("query", "key", "value"):
    linear, leaf = f"{layer}attention.attention.{name}.", f"{blocks}/attn/{name}"
    table += [
      rules.Rule(f"{linear}weight", f"{leaf}/kernel", "(M h) W -> W M h", layers),
      rules.Rule(f"{linear}bias", f"{leaf}/bias", "(M h) -> M h", layers),
    ]
  out, leaf = f"{layer}attention.output.dense.", f"{blocks}/attn/out"
  table += [
    rules.Rule(f"{out}weight", f"{leaf}/kernel", "W (M h) -> M h W", layers),
    rules.Rule(f"{out}bias", f"{leaf}/bias", "W -> W", layers),
    *towers.norm_rules(f"{layer}layernorm_after.", f"{blocks}/norm_mlp", "W", layers),
    *towers.linear_rules(
      f"{layer}intermediate.dense.", f"{blocks}/mlp/up", "W", "G", layers
    ),
    *towers.linear_rules(
      f"{layer}output.dense.", f"{blocks}/mlp/down", "G", "W", layers
    ),
    *towers.norm_rules("layernorm.", f"{ours}/norm", "W"),
  ]
  if pooler:
    table += towers.linear_rules("pooler.dense.", "pooler/dense", "W'", "W")
  return table


def _read(path):
  """(spec of the tower, tensors without a prefix, the file they are of)."""
  spec = model_spec(path)
  tensors, where = hf_folder.tensors(path)
  return spec, {PREFIX.sub("", name): x for name, x in tensors.items()}, where
