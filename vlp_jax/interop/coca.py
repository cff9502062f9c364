"""CoCa checkpoints of open_clip (coca_model.py), which has no other of its kind.

Its decoder's blocks and cross-attention blocks in turn are one layer of ours each, with
`mlp_before` and `norm_memory`.
"""

from collections.abc import Mapping, Sequence
import os
from typing import Any

import numpy as np

from vlp_jax.interop import layout
from vlp_jax.interop import made_with as made_with_lib
from vlp_jax.interop import reader
from vlp_jax.interop import rules
from vlp_jax.interop import towers

# Sizes: those of `towers`, E embedding, Q queries, P heads of the pooling, R of them.

SIGNATURE = (r"visual\.attn_pool\..*", r"text_decoder\.cross_attn\..*")
BLOCKS = "model/{}/blocks/attn/query/kernel"
# torch's epsilon, and no QuickGELU (model_configs/coca_*.json).
LAYERS = dict(act="gelu", norm_eps=1e-5)
MADE_WITH = made_with_lib.of(image=LAYERS, text=LAYERS, fusion=LAYERS)


Checkpoint = layout.Checkpoint


def load(
  path: str | os.PathLike,
  *,
  num_heads_image: int | None = None,
  num_heads_text: int | None = None,
  num_heads_pool: int = 8,
  key: str | None = None,
) -> Checkpoint:
  """Reads a file of open_clip.

  Args:
    path: see `reader.load`, also for `key`.
    num_heads_image, num_heads_text, num_heads_pool: of the ViT, of the text towers and
      of attention pooling, which no shape tells; None: of 64 each. All CoCa models of
      open_clip have these.

  Raises:
    FileNotFoundError, ValueError: see `reader.load` and `rules.from_theirs`.
  """
  tensors = reader.load(path, key=key)
  what = f"{path} is no CoCa checkpoint of open_clip"
  table = parameter_rules(
    depth_image=towers.depth(tensors, "visual.transformer.resblocks.{i}.", what),
    depth_text=towers.depth(tensors, "text.transformer.resblocks.{i}.", what),
    depth_fusion=towers.depth(tensors, "text_decoder.cross_attn.{i}.", what),
    fused_pool="visual.attn_pool.attn.in_proj_weight" in tensors,
  )
  image, text = "visual.ln_pre.weight", "text.ln_final.weight"
  sizes = dict(
    M=towers.heads(tensors, image, num_heads_image, "num_heads_image"),
    N=towers.heads(tensors, text, num_heads_text, "num_heads_text"),
    P=num_heads_pool,
  )
  what = f"the CoCa checkpoint {path}"
  return Checkpoint(rules.from_theirs(tensors, table, sizes=sizes, what=what))


def save(
  path: str | os.PathLike, checkpoint: Checkpoint, *, key: str | None = None
) -> None:
  """Writes a file of open_clip; what `load` read comes back bit by bit.

  Args:
    path: .pt or .safetensors, see `reader.save`.
    checkpoint: a tree of arrays, without boxes.
    key: open_clip's own files have "state_dict"; only for .pt.
  """
  reader.save(path, export(checkpoint.params), key=key)


def export(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """A tree of the parameters' shape (gradients too) under open_clip's names."""
  depths, sizes = _sizes(params)
  return rules.to_theirs(params, parameter_rules(**depths), sizes=sizes)


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
  """Parameters of a model from such a file: `c.init = dict(type="coca", path=…)`.

  The table of image positions is resized to the model's grid. Arguments and errors as
  of `albef.init`.
  """
  made_with_lib.check(model, MADE_WITH, path, made_with)
  depths, sizes = _sizes(abstract_params)
  return rules.from_theirs(
    reader.load(path, key=key),
    parameter_rules(**depths),
    sizes=sizes,
    shapes=abstract_params,
    skip=skip,
    fresh=fresh,
    what=f"the CoCa checkpoint {path}, for this model,",
  )


def parameter_rules(
  *,
  depth_image: int,
  depth_text: int,
  depth_fusion: int,
  fused_pool: bool,
  ours: str = "",
) -> rules.Table:
  """The parameters <-> our tree below `ours`.

  fused_pool: the pooling keeps the ViT's width, and has query, key and value in one
  tensor.
  """
  image, text = f"{ours}model/image", f"{ours}model/text"
  fusion = f"{ours}model/fusion"
  return [
    *towers.clip_vit_rules(
      "visual.", image, depth_image, pooled="E", how="antialiased"
    ),
    rules.Rule("visual.attn_pool.query", f"{image}/query_pool/query", "Q E -> Q E"),
    *towers.norm_rules("visual.attn_pool.ln_q.", f"{image}/query_pool/norm_query", "E"),
    *towers.norm_rules("visual.attn_pool.ln_k.", f"{image}/query_pool/norm", "W"),
    *_pool_rules("visual.attn_pool.attn.", f"{image}/query_pool/attn", fused_pool),
    rules.Rule("visual.proj", f"{ours}model/image_proj/kernel", "E E' -> E E'"),
    rules.Rule("text.cls_emb", f"{text}/cls", "D -> D"),
    *towers.clip_text_rules("text.", text, depth_text),
    rules.Rule("text.text_projection", f"{ours}model/text_proj/kernel", "D E -> D E"),
    *_decoder_rules(f"{fusion}/blocks", depth_fusion),
    *towers.norm_rules("text_decoder.ln_final.", f"{fusion}/norm", "D"),
    rules.Rule(
      "text_decoder.text_projection", f"{ours}objectives_lm/out/kernel", "D V -> D V"
    ),
    rules.Rule("logit_scale", f"{ours}model/log_scale", "->"),
  ]


def _decoder_rules(ours, depth):
  """The two blocks of open_clip that are a layer of ours."""
  theirs, layers = "text_decoder.resblocks.", range(depth)
  plain = towers.resblock_rules(
    theirs, ours, depth, mlp="mlp_before", norm="norm_before"
  )
  cross = "text_decoder.cross_attn.{i}."
  attention = towers.fused_attention_rules(f"{cross}attn.", f"{ours}/cross", layers)
  return [
    *rules.relabel([*plain, *attention], towers.TEXT_LETTERS),
    *towers.norm_rules(f"{cross}ln_1.", f"{ours}/norm_cross", "D", layers),
    *towers.norm_rules(f"{cross}ln_1_kv.", f"{ours}/norm_memory", "D", layers),
    *towers.norm_rules(f"{cross}ln_2.", f"{ours}/norm_mlp", "D", layers),
    *towers.linear_rules(f"{cross}mlp.c_fc.", f"{ours}/mlp/up", "D", "F", layers),
    *towers.linear_rules(f"{cross}mlp.c_proj.", f"{ours}/mlp/down", "F", "D", layers),
  ]


def _pool_rules(theirs, ours, fused):
  """Attention of queries of width E to tokens of width W."""
  table = towers.fused_attention_rules(theirs, ours)
  table = rules.relabel(table, {"W": "E", "M": "P", "h": "R"})
  if fused:
    return table
  separate = [
    rules.Rule(
      f"{theirs}{name[0]}_proj_weight",
      f"{ours}/{name}/kernel",
      f"(P R) {width} -> {width} P R",
    )
    for name, width in (("query", "E"), ("key", "W"), ("value", "W"))
  ]
  return [*separate, *table[1:]]


def _sizes(params):
  """(depths, sizes): what the rules need to know of a tree of ours."""
  pool = "model/image/query_pool/attn/{}/kernel"
  wanted = [BLOCKS.format(tower) for tower in ("image", "text", "fusion")]
  wanted += [pool.format("query"), pool.format("key"), layout.PATCH]
  refusal = (
    "this model is not of CoCa's kind (a ViT with attention pooling, a text encoder and"
    " cross-attention fusion)"
  )
  found = layout.shapes(params, wanted, refusal)
  image, text, fusion, query, key, patch = found.values()
  depths = dict(depth_image=image[0], depth_text=text[0], depth_fusion=fusion[0])
  depths["fused_pool"] = query[0] == key[0]
  return depths, dict(M=image[2], N=text[2], P=query[1], **layout.sides(patch))
