"""ViT and DeiT of Hugging Face's transformers <-> our ViT.

Poolers and classifiers that a directory has are kept beside the tower: `HEADS`.
"""

from collections.abc import Mapping, Sequence
import math
import os
import re
from typing import Any

from vlp_jax.interop import hf
from vlp_jax.interop import hf_bert
from vlp_jax.interop import rules
from vlp_jax.interop import towers
from vlp_jax.ops import tree as tree_lib

# Sizes: those of `towers`, C classes, X of the pooler.

PREFIXES = ("vit.", "deit.", "")
CLS = "embeddings.cls_token"
SIGNATURE = (
  r"(vit\.|deit\.|)embeddings\.patch_embeddings\.projection\.weight",
  r"(vit\.|deit\.|)encoder\.layer\.0\.attention\.attention\.query\.weight",
  r"!.*text_embeddings\..*",
)
KINDS = ("vit", "deit")
DIST = "embeddings.distillation_token"
# Heads, by the names of ours, and what theirs is called; DeiT's model that is read with
# its teacher has the last two.
HEADS = {
  "pooler": "{p}pooler.dense.",
  "classifier": "classifier.",
  "cls_classifier": "cls_classifier.",
  "distillation_classifier": "distillation_classifier.",
}


Checkpoint = hf_bert.Checkpoint


def load(path: str | os.PathLike) -> Checkpoint:
  """Reads a directory, or a name of the hub.

  Raises:
    FileNotFoundError, ValueError: see `hf.read` and `rules.from_theirs`.
  """
  directory = hf.read(path)
  what = f"the directory {directory.path}"
  fields, prefix = fields_of(directory.config, what), _prefix(directory)
  distilled = f"{prefix}{DIST}" in directory.tensors
  fields |= dict(distill_token=True) if distilled else {}
  marks = {name: f"{theirs.format(p=prefix)}weight" for name, theirs in HEADS.items()}
  has = [name for name, mark in marks.items() if mark in directory.tensors]
  table = tower_rules(prefix, "model/image", fields["depth"], distilled=distilled)
  table += head_rules(prefix, has)
  sizes = dict(M=fields["num_heads"])
  params = rules.from_theirs(directory.tensors, table, sizes=sizes, what=what)
  _check_shapes(params, fields, what)
  return Checkpoint(params, fields, directory.config, prefix)


def save(path: str | os.PathLike, checkpoint: Checkpoint) -> None:
  """Writes a directory; the tensors that `load` read come back bit by bit."""
  prefix, params, fields = checkpoint.prefix, checkpoint.params, checkpoint.fields
  distilled = fields.get("distill_token", False)
  table = tower_rules(prefix, "model/image", fields["depth"], distilled=distilled)
  table += head_rules(prefix, [name for name in HEADS if name in params])
  sizes = dict(p=fields["patch"], q=fields["patch"])
  what = f"what to write to {path}"
  tensors = rules.to_theirs(params, table, sizes=sizes, what=what)
  hf.write(path, checkpoint.config, tensors)


def of_model(model: Any, params: Mapping[str, Any]) -> Checkpoint:
  """The image tower of a trained model, as a ViTModel or DeiTModel without pooler.

  Args:
    model: the VLM. params: its pretrainer's, arrays without boxes.

  Raises:
    ValueError: the tower is of another kind; lists the fields.
  """
  image = model.image
  tower = tower_of(model, params, distill_token=image.distill_token)
  kind = "deit" if image.distill_token else "vit"
  config = dict(
    architectures=["DeiTModel" if kind == "deit" else "ViTModel"],
    model_type=kind,
    hidden_size=image.width,
    num_hidden_layers=image.depth,
    num_attention_heads=image.num_heads,
    intermediate_size=image.mlp_dim,
    patch_size=image.patch,
    image_size=image.res,
    num_channels=3,
    qkv_bias=True,
    layer_norm_eps=image.norm_eps,
    hidden_act=hf.their_activation(image.act),
    hidden_dropout_prob=image.dropout,
    attention_probs_dropout_prob=image.dropout_attention,
  )
  fields = fields_of(config, "the model")
  fields |= dict(distill_token=True) if image.distill_token else {}
  return Checkpoint(tower, fields, config)


def tower_of(
  model: Any, params: Mapping[str, Any], what: str = "a ViT of others", **wanted: Any
) -> dict[str, Any]:
  """The image tower's parameters, if it is a plain ViT and has the `wanted` fields.

  Raises:
    ValueError: it is of another kind; lists the fields.
  """
  plain = dict(class_token=True, distill_token=False, posemb="learned")
  wanted = plain | dict(norm="pre", norm_pre=False) | wanted
  own = {name: getattr(model.image, name) for name in wanted}
  hf.check(wanted, own, what=what, model="model.image")
  return {"model": {"image": params["model"]["image"]}}


def init(
  abstract_params: Mapping[str, Any],
  *,
  path: str | os.PathLike,
  into: str = "model/image",
  model: Any = None,
  skip: Sequence[str] = (),
  fresh: Sequence[str] = (),
) -> dict[str, Any]:
  """The image tower of a model from a directory or a name of the hub.

  The table of positions is resized to the model's grid; poolers and classifiers are
  left out. Arguments and errors are those of `hf_bert.init`.
  """
  directory = hf.read(path)
  what = f"the directory {directory.path}"
  fields, prefix = fields_of(directory.config, what), _prefix(directory)
  if model is not None:
    hf_bert.compare(model, into, fields, what)
  query = tree_lib.flatten(abstract_params).get(f"{into}/blocks/attn/query/kernel")
  left_out = [f"{re.escape(name.format(p=prefix))}.*" for name in HEADS.values()]
  distilled = f"{prefix}{DIST}" in directory.tensors
  return rules.fill(
    abstract_params,
    [into],
    directory.tensors,
    tower_rules(
      prefix, into, 0 if query is None else query.shape[0], distilled=distilled
    ),
    sizes=dict(M=fields["num_heads"]),
    skip=(*left_out, *skip),
    fresh=fresh,
    what=f"{what}, for this model,",
  )


def fields_of(config: Mapping[str, Any], what: str) -> dict[str, Any]:
  """The fields of an image tower that config.json describes."""
  kind = config.get("model_type")
  if kind not in KINDS:
    raise ValueError(f"{what}: model_type={kind!r}: want {' or '.join(KINDS)}.")
  hf.require(config, dict(num_channels=3, qkv_bias=True), what)
  try:
    return dict(
      width=config["hidden_size"],
      depth=config["num_hidden_layers"],
      num_heads=config["num_attention_heads"],
      mlp_dim=config["intermediate_size"],
      patch=hf.side(config["patch_size"], f"{what}: patch_size"),
      res=hf.side(config["image_size"], f"{what}: image_size"),
      norm="pre",
      norm_eps=config["layer_norm_eps"],
      act=hf.activation(config, what),
    )
  except KeyError as error:
    raise ValueError(f"{what}: its config.json has no {error}.") from error


def tower_rules(
  prefix: str, ours: str, depth: int, *, distilled: bool = False
) -> rules.Table:
  """The tower (sizes W G M h L p q); `distilled`: with DeiT's second token."""
  layers = range(depth)
  embed, blocks = f"{prefix}embeddings.", f"{ours}/blocks"
  layer = f"{prefix}encoder.layer.{{i}}."
  patch = f"{embed}patch_embeddings.projection."
  table = [
    rules.Rule(f"{prefix}{CLS}", f"{ours}/cls", "1 1 W -> W"),
    towers.posembed_rule(
      f"{embed}position_embeddings", f"{ours}/posemb", 1 + int(distilled)
    ),
    rules.Rule(f"{patch}weight", f"{ours}/patch/kernel", "W 3 p q -> (p q 3) W"),
    rules.Rule(f"{patch}bias", f"{ours}/patch/bias", "W -> W"),
    *towers.norm_rules(f"{prefix}layernorm.", f"{ours}/norm", "W"),
    *towers.norm_rules(f"{layer}layernorm_before.", f"{blocks}/norm_attn", "W", layers),
    *towers.norm_rules(f"{layer}layernorm_after.", f"{blocks}/norm_mlp", "W", layers),
    *towers.linear_rules(
      f"{layer}intermediate.dense.", f"{blocks}/mlp/up", "W", "G", layers
    ),
    *towers.linear_rules(
      f"{layer}output.dense.", f"{blocks}/mlp/down", "G", "W", layers
    ),
  ]
  attention = f"{layer}attention."
  for name in ("query", "key", "value"):
    theirs, own = f"{attention}attention.{name}.", f"{blocks}/attn/{name}"
    table += [
      rules.Rule(f"{theirs}weight", f"{own}/kernel", "(M h) W -> W M h", layers),
      rules.Rule(f"{theirs}bias", f"{own}/bias", "(M h) -> M h", layers),
    ]
  if distilled:
    table.append(rules.Rule(f"{prefix}{DIST}", f"{ours}/dist", "1 1 W -> W"))
  theirs, own = f"{attention}output.dense.", f"{blocks}/attn/out"
  return [
    *table,
    rules.Rule(f"{theirs}weight", f"{own}/kernel", "W (M h) -> M h W", layers),
    rules.Rule(f"{theirs}bias", f"{own}/bias", "W -> W", layers),
  ]


def head_rules(prefix: str, names: Sequence[str]) -> rules.Table:
  """Those of `HEADS` that are named."""
  table = []
  for name in names:
    out = "X" if name == "pooler" else "C"
    table += towers.linear_rules(HEADS[name].format(p=prefix), name, "W", out)
  return table


def _prefix(directory):
  for prefix in PREFIXES:
    if f"{prefix}{CLS}" in directory.tensors:
      return prefix
  raise ValueError(f"{directory.path} is of no ViT: it has no tensor {CLS}.")


def _check_shapes(params, fields, what):
  """The tensors are those that config.json describes."""
  image = tree_lib.flatten(params["model"]["image"])
  patch, width = image["patch/kernel"].shape
  found = dict(
    width=width,
    patch=round((patch / 3) ** 0.5),
    mlp_dim=image["blocks/mlp/up/kernel"].shape[2],
    res=math.isqrt(image["posemb"].shape[0] - 1) * fields["patch"],
  )
  said = {name: fields[name] for name in found}
  hf.check(found, said, what=f"{what} (its tensors)", model="config.json")
