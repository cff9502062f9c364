"""SigLIP as open_clip builds it: `CustomTextCLIP` of timm's ViT and its own text tower.

Its CLIP models have OpenAI's layout: see `clip.py`.
"""

from collections.abc import Mapping, Sequence
import os
from typing import Any

import numpy as np

from vlp_jax.interop import dual
from vlp_jax.interop import made_with as made_with_lib
from vlp_jax.interop import reader
from vlp_jax.interop import rules
from vlp_jax.interop import towers

SIGNATURE = (
  r"visual\.trunk\.attn_pool\.latent",
  r"text\.transformer\.resblocks\.0\.attn\.in_proj_weight",
)
# model_configs/ViT-*-SigLIP*.json and timm's vit_*_siglip_*: not in the weights.
MADE_WITH = {
  "model.image.norm_eps": 1e-6,
  "model.image.pool": "map",
  "model.text.norm_eps": 1e-6,
  "model.text.pool": "last",
  "model.text.see_padding": True,
}


def load(
  path: str | os.PathLike,
  *,
  num_heads_image: int | None = None,
  num_heads_text: int | None = None,
  key: str | None = None,
) -> dict[str, Any]:
  """Parameters from a file of open_clip: see `clip.load` for the arguments."""
  tensors = reader.load(path, key=key)
  return LAYOUT.read(
    tensors, path, num_heads_image=num_heads_image, num_heads_text=num_heads_text
  )


def save(
  path: str | os.PathLike, params: Mapping[str, Any], *, key: str | None = None
) -> None:
  """Writes a file that open_clip reads: see `clip.save` for the arguments."""
  reader.save(path, LAYOUT.write(params), key=key)


def export(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """A tree of the parameters' shape (gradients) under open_clip's names."""
  return LAYOUT.write(params)


def init(
  abstract_params: Mapping[str, Any],
  *,
  path: str | os.PathLike,
  key: str | None = None,
  skip: Sequence[str] = (),
  fresh: Sequence[str] = (),
  model: Any = None,
  made_with: made_with_lib.Told | None = None,
) -> dict[str, Any]:
  """Parameters of a model: see `clip.init` for the arguments and errors."""
  made_with_lib.check(model, MADE_WITH, path, made_with)
  tensors = reader.load(path, key=key)
  return LAYOUT.fit(lambda: tensors, path, abstract_params, skip=skip, fresh=fresh)


def parameter_rules(depth_image: int, depth_text: int) -> rules.Table:
  """The state dict <-> {"model": …, "objectives_itc": …} (sizes of `towers`, E)."""
  trunk = "visual.trunk."
  return [
    *towers.vit_rules(trunk, "model/image", depth_image, class_token=False),
    *pool_rules(f"{trunk}attn_pool.", "model/image/map_pool"),
    *towers.clip_text_rules("text.", "model/text", depth_text),
    *towers.linear_rules("text.text_projection.", "model/text_proj", "D", "E"),
    rules.Rule("logit_scale", "model/log_scale", "->"),
    rules.Rule("logit_bias", dual.BIAS, "->"),
  ]


def pool_rules(theirs: str, ours: str) -> rules.Table:
  """timm's `AttentionPoolLatent` with one latent (sizes W G M h)."""
  attn = f"{ours}/attn"
  pair = [tuple(f"{attn}/{name}/{p}" for name in ("key", "value")) for p in _KB]
  return [
    rules.Rule(f"{theirs}latent", f"{ours}/probe", "1 1 W -> 1 W"),
    rules.Rule(f"{theirs}q.weight", f"{attn}/query/kernel", "(M h) W -> W M h"),
    rules.Rule(f"{theirs}q.bias", f"{attn}/query/bias", "(M h) -> M h"),
    rules.Rule(f"{theirs}kv.weight", pair[0], "(2 M h) W -> 2 W M h"),
    rules.Rule(f"{theirs}kv.bias", pair[1], "(2 M h) -> 2 M h"),
    rules.Rule(f"{theirs}proj.weight", f"{attn}/out/kernel", "W (M h) -> M h W"),
    rules.Rule(f"{theirs}proj.bias", f"{attn}/out/bias", "W -> W"),
    *towers.norm_rules(f"{theirs}norm.", f"{ours}/norm", "W"),
    *towers.linear_rules(f"{theirs}mlp.fc1.", f"{ours}/mlp/up", "W", "G"),
    *towers.linear_rules(f"{theirs}mlp.fc2.", f"{ours}/mlp/down", "G", "W"),
  ]


_KB = ("kernel", "bias")

LAYOUT = dual.layout(
  "a SigLIP checkpoint of open_clip",
  parameter_rules,
  image_layer="visual.trunk.blocks.{i}.",
  text_layer="text.transformer.resblocks.{i}.",
  image_norm="visual.trunk.norm.weight",
  text_norm="text.ln_final.weight",
)
