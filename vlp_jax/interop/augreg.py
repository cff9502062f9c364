"""ViT in vit_jax's .npz layout (AugReg, Steiner et al. 2021) <-> our ViT.

https://github.com/google-research/vision_transformer: the checkpoints that LiT, BLIP's
large model and ViLT start from. What a file has beside the tower is kept: "classifier",
and "pre_logits" of the older files.
"""

from collections.abc import Mapping, Sequence
import os
import pathlib
import re
from typing import Any

from vlp_jax.interop import hf_vit
from vlp_jax.interop import layout
from vlp_jax.interop import made_with as made_with_lib
from vlp_jax.interop import reader
from vlp_jax.interop import rules
from vlp_jax.interop import towers
from vlp_jax.ops import tree as tree_lib

# Sizes: those of `towers`, C classes.

BLOCK = "Transformer/encoderblock_{i}/"
# What a block is made of, as Flax numbered its parts before Linen (2020) and does now,
# and the table of positions.
OLD = (
  *("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3"),
  "Transformer/posembed_input/pos_embedding",
)
LINEN = (
  *("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0"),
  OLD[-1],
)
SIGNATURE = (
  r"embedding/kernel",
  r"Transformer/posembed_input/pos_embedding",
  r"Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel",
)
# Files of AugReg (https://arxiv.org/abs/2106.10270), for who lacks them.
AUGREG = r"\w+_\d+-i\w+-.*-aug_.*\.npz"
SOURCE = "https://storage.googleapis.com/vit_models/augreg/"
# vit_jax has flax's GELU, of tanh; timm, through which ALBEF's kind reads these files,
# the other one.
MADE_WITH = dict(act=frozenset({"gelu", "gelu_tanh"}), norm_eps=1e-6)
HEADS = {"classifier": "head", "pre_logits": "pre_logits"}


Checkpoint = layout.Checkpoint


def load(path: str | os.PathLike) -> Checkpoint:
  """Reads a file; its shapes tell the heads.

  Raises:
    FileNotFoundError, ValueError: see `reader.load` and `rules.from_theirs`.
  """
  tensors = reader.load(path)
  depth = towers.depth(tensors, BLOCK, f"{path} is no ViT in vit_jax's layout")
  has = [name for name, theirs in HEADS.items() if f"{theirs}/kernel" in tensors]
  table = [*tower_rules("model/image", depth), *head_rules(has)]
  return Checkpoint(rules.from_theirs(tensors, table, what=f"the ViT {path}"))


def save(path: str | os.PathLike, checkpoint: Checkpoint) -> None:
  """Writes a .npz file; what `load` read comes back bit by bit."""
  leaves = tree_lib.flatten(checkpoint.params)
  depth = leaves["model/image/blocks/attn/query/kernel"].shape[0]
  has = [name for name in HEADS if f"{name}/kernel" in leaves]
  table = [*tower_rules("model/image", depth), *head_rules(has)]
  sizes, what = layout.sides(leaves[layout.PATCH].shape), f"what to write to {path}"
  tensors = rules.to_theirs(checkpoint.params, table, sizes=sizes, what=what)
  reader.save(path, tensors)


def of_model(model: Any, params: Mapping[str, Any]) -> Checkpoint:
  """The image tower of a trained model; no file says its activation and epsilon.

  Raises:
    ValueError: the tower is of another kind; lists the fields.
  """
  told = dict(act="gelu", norm_eps=1e-6)
  return Checkpoint(hf_vit.tower_of(model, params, "vit_jax's ViT", **told))


def init(
  abstract_params: Mapping[str, Any],
  *,
  path: str | os.PathLike,
  into: str = "model/image",
  skip: Sequence[str] = (),
  fresh: Sequence[str] = (),
  model: Any = None,
  made_with: made_with_lib.Told | None = None,
) -> dict[str, Any]:
  """The image tower of a model from a file; classifiers are left out.

  The table of positions is resized to the model's grid as timm does it for BLIP and
  ViLT, bicubic (vit_jax's own way is bilinear). Arguments and errors are those of
  `hf_bert.init`; `made_with` is of the module of that name.
  """
  file = pathlib.Path(path)
  if re.fullmatch(AUGREG, file.name) and not file.exists():
    raise FileNotFoundError(
      f"no checkpoint file {path}: it is {SOURCE}{file.name}; put it there, or say its"
      " place in --config.init.image.path=…; --config.init=None starts from nothing."
    )
  made = made_with_lib.of(**{into.removeprefix("model/"): MADE_WITH})
  made_with_lib.check(model, made, path, made_with)
  query = tree_lib.flatten(abstract_params).get(f"{into}/blocks/attn/query/kernel")
  return rules.fill(
    abstract_params,
    [into],
    reader.load(path),
    tower_rules(into, 0 if query is None else query.shape[0]),
    skip=("head/.*", "pre_logits/.*", *skip),
    fresh=fresh,
    what=f"the ViT {path}, for this model,",
  )


def tower_rules(
  ours: str, depth: int, *, start: str = "", names: Sequence[str] = OLD
) -> rules.Table:
  """The tower, whose kernels are laid out as ours (sizes W G M h L p q).

  start: of their names. names: of what is in a block, and of the table of positions.
  """
  layers, blocks, block = range(depth), f"{ours}/blocks", f"{start}{BLOCK}"
  first, attention, second, mlp, positions = names
  attention, mlp = f"{block}{attention}/", f"{block}{mlp}/"
  ends = dict(scale="W", bias="W")
  table = [
    rules.Rule(f"{start}cls", f"{ours}/cls", "1 1 W -> W"),
    towers.posembed_rule(f"{start}{positions}", f"{ours}/posemb"),
    rules.Rule(
      f"{start}embedding/kernel", f"{ours}/patch/kernel", "p q 3 W -> (p q 3) W"
    ),
    rules.Rule(f"{start}embedding/bias", f"{ours}/patch/bias", "W -> W"),
    *same(f"{start}Transformer/encoder_norm/", f"{ours}/norm", **ends),
    *same(f"{block}{first}/", f"{blocks}/norm_attn", layers, **ends),
    *same(f"{block}{second}/", f"{blocks}/norm_mlp", layers, **ends),
    *same(f"{attention}out/", f"{blocks}/attn/out", layers, kernel="M h W", bias="W"),
  ]
  for name in ("query", "key", "value"):
    sides = dict(kernel="W M h", bias="M h")
    table += same(f"{attention}{name}/", f"{blocks}/attn/{name}", layers, **sides)
  for theirs, own, kernel, bias in (
    ("Dense_0", "up", "W G", "G"),
    ("Dense_1", "down", "G W", "W"),
  ):
    sides = dict(kernel=kernel, bias=bias)
    table += same(f"{mlp}{theirs}/", f"{blocks}/mlp/{own}", layers, **sides)
  return table


def head_rules(names: Sequence[str]) -> rules.Table:
  """Those of `HEADS` that are named."""
  table = []
  if "classifier" in names:
    table += same("head/", "classifier", kernel="X C", bias="C")
  if "pre_logits" in names:
    table += same("pre_logits/", "pre_logits", kernel="W X", bias="X")
  return table


def same(theirs, ours, layers=None, **sides):
  """Leaves that are laid out alike on both sides: {name: axes}."""
  return [
    rules.Rule(f"{theirs}{name}", f"{ours}/{name}", f"{axes} -> {axes}", layers)
    for name, axes in sides.items()
  ]
