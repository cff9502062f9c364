"""ViT in timm's layout (DeiT's .pth files, AugReg in timm) <-> our ViT.

ALBEF and BLIP start their image tower from deit_base_patch16_224-b5f2ef4d.pth. A
classifier that the file has is kept beside the tower: "classifier", and DeiT's second
one: "distillation_classifier".
"""

from collections.abc import Collection, Mapping, Sequence
import os
import pathlib
from typing import Any

from vlp_jax.interop import hf_vit
from vlp_jax.interop import layout
from vlp_jax.interop import made_with as made_with_lib
from vlp_jax.interop import reader
from vlp_jax.interop import rules
from vlp_jax.interop import towers
from vlp_jax.ops import tree as tree_lib

# Sizes: those of `towers`, C classes.

SIGNATURE = (r"patch_embed\.proj\.weight", r"blocks\.0\.attn\.qkv\.weight", "pos_embed")
HEAD = r"head(_dist)?\..*"
# DeiT with distillation: a second token, and a classifier of its own.
DIST, HEAD_DIST = "dist_token", "head_dist.weight"
# Where files that configs name are, for who lacks them.
SOURCES = {
  "deit_base_patch16_224-b5f2ef4d.pth": "https://dl.fbaipublicfiles.com/deit/",
}


Checkpoint = layout.Checkpoint


def load(
  path: str | os.PathLike, *, num_heads: int | None = None, key: str | None = None
) -> Checkpoint:
  """Reads a file; `num_heads` None: of 64 each. `key`: see `reader.load`.

  Raises:
    FileNotFoundError, ValueError: see `reader.load` and `rules.from_theirs`.
  """
  tensors = reader.load(path, key=key)
  blocks = "blocks.{i}."
  depth = towers.depth(tensors, blocks, f"{path} is no ViT in timm's layout")
  sizes = dict(M=towers.heads(tensors, "norm.weight", num_heads, "num_heads"))
  table = file_rules(depth, tensors)
  what = f"the ViT {path}"
  return Checkpoint(rules.from_theirs(tensors, table, sizes=sizes, what=what))


def save(
  path: str | os.PathLike, checkpoint: Checkpoint, *, key: str | None = None
) -> None:
  """Writes a file; what `load` read comes back bit by bit. Arguments: `reader.save`."""
  leaves = tree_lib.flatten(checkpoint.params)
  depth = leaves["model/image/blocks/attn/query/kernel"].shape[0]
  sizes = layout.sides(leaves[layout.PATCH].shape)
  named = {
    DIST: "model/image/dist",
    "head.weight": "classifier/kernel",
    HEAD_DIST: "distillation_classifier/kernel",
  }
  table = file_rules(depth, [name for name, ours in named.items() if ours in leaves])
  what = f"what to write to {path}"
  tensors = rules.to_theirs(checkpoint.params, table, sizes=sizes, what=what)
  reader.save(path, tensors, key=key)


def of_model(model: Any, params: Mapping[str, Any]) -> Checkpoint:
  """The image tower of a trained model; no file says its activation and epsilon.

  Raises:
    ValueError: the tower is of another kind; lists the fields.
  """
  told = dict(act="gelu", norm_eps=1e-6)
  told["distill_token"] = model.image.distill_token
  return Checkpoint(hf_vit.tower_of(model, params, "timm's ViT", **told))


def init(
  abstract_params: Mapping[str, Any],
  *,
  path: str | os.PathLike,
  into: str | Mapping[str, str] = "model/image",
  key: str | None = None,
  skip: Sequence[str] = (),
  fresh: Sequence[str] = (),
  model: Any = None,
  made_with: made_with_lib.Told | None = None,
) -> dict[str, Any]:
  """The image tower of a model from a file; the classifier is left out.

  The table of positions is resized to the model's grid, as ALBEF's official code does
  it. Arguments and errors are those of `hf_bert.init`; no file tells its heads,
  and `made_with` is of the module of that name.

  into: path of the tower, or {"image": path, "fusion": path}, where the blocks and the
  norm behind them are a fusion's, and the tower has the patches (ViLT).
  """
  both = {"image": into, "fusion": into} if isinstance(into, str) else dict(into)
  if set(both) != {"image", "fusion"}:
    raise ValueError(
      f"the ViT {path}: into={into!r}: want a path, or a dict of image and fusion."
    )
  file = pathlib.Path(path)
  if file.name in SOURCES and not file.exists():
    raise FileNotFoundError(
      f"no checkpoint file {path}: it is {SOURCES[file.name]}{file.name}; put it there,"
      " or say its place in --config.init.image.path=…; --config.init=None starts from"
      " nothing."
    )
  image, stack = both["image"], both["fusion"]
  tower = stack.removeprefix("model/")
  made = made_with_lib.of(**{tower: made_with_lib.TIMM})
  made_with_lib.check(model, made, path, made_with)
  query = tree_lib.flatten(abstract_params).get(f"{stack}/blocks/attn/query/kernel")
  depth = 0 if query is None else query.shape[0]
  # Of a fusion the file fills the blocks and their norm, and nothing else.
  below = [image] if stack == image else [image, f"{stack}/blocks", f"{stack}/norm"]
  tensors = reader.load(path, key=key)
  return rules.fill(
    abstract_params,
    below,
    tensors,
    [
      *towers.vit_embedding_rules("", image, distilled=DIST in tensors),
      *towers.vit_block_rules("", stack, depth),
    ],
    sizes={} if query is None else dict(M=query.shape[2]),
    skip=(HEAD, *skip),
    fresh=fresh,
    what=f"the ViT {path}, for this model,",
  )


def file_rules(depth: int, names: Collection[str]) -> rules.Table:
  """A whole file that has these of its names (`DIST`, classifiers)."""
  table = towers.vit_rules("", "model/image", depth, distilled=DIST in names)
  if "head.weight" in names:
    table += towers.linear_rules("head.", "classifier", "W", "C")
  if HEAD_DIST in names:
    table += towers.linear_rules("head_dist.", "distillation_classifier", "W", "C")
  return table
