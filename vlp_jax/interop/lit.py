"""LiT's .npz files: a Vision Transformer and a text tower tuned to it <-> ours.

https://github.com/google-research/vision_transformer vit_jax/models_lit.py: LiT-B16B,
B16B_2 and L16L have flaxformer's BERT, L16S and L16Ti a small Transformer. big_vision's
coco_B16B has other names for the images. Flax kernels are laid out as ours, but for
BERT's, whose heads are joined.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import os
from typing import Any

import numpy as np

from vlp_jax.interop import augreg
from vlp_jax.interop import big_vision
from vlp_jax.interop import dual
from vlp_jax.interop import flax_file
from vlp_jax.interop import layout
from vlp_jax.interop import made_with as made_with_lib
from vlp_jax.interop import reader
from vlp_jax.interop import rules
from vlp_jax.interop import towers
from vlp_jax.ops import tree as tree_lib

# Sizes: those of `towers`, E embedding.

IMAGES = {
  "vit_jax": augreg.LINEN,
  "before_linen": augreg.OLD,
  "big_vision": (*augreg.LINEN[:-1], "pos_embedding"),
}
BERT = "txt/BertEncoder_0/"
LAYER = f"{BERT}encoder_block/layer_sequence/layers_{{i}}/"
WORDS = {
  "bert": f"{BERT}embedder/embedders_token_ids/embedding",
  "transformer": "txt/Embed_0/embedding",
}
SIGNATURE = (
  r"(params/|)img/embedding/kernel",
  r"(params/|)(img/Transformer/posembed_input/pos_embedding|txt/BertEncoder_0/.*)",
  r"(params/|)txt/(BertEncoder_0/embedder/embedders_token_ids|Embed_0)/embedding",
)
# models_vit.py and flaxformer's make_mlp_block: Flax's GELU, of tanh.
VIT = dict(act="gelu_tanh", norm_eps=1e-6, norm="pre")
MADE_WITH = {
  "bert": made_with_lib.of(
    image=VIT, text=dict(act="gelu_tanh", norm_eps=1e-12, norm="post", pool="first")
  ),
  "transformer": made_with_lib.of(
    image=VIT, text=VIT | dict(pool="last", see_padding=True)
  ),
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What a file holds.

  params: a tree of ours. prefix: of its names. images: one of `IMAGES`, how the image
    tower's are made. scanned: the layers of a stack lie in one array.
  """

  params: dict[str, Any]
  prefix: str = ""
  images: str = "vit_jax"
  scanned: bool = False


def load(path: str | os.PathLike, *, num_heads_text: int | None = None) -> Checkpoint:
  """Reads a file.

  Args:
    path: see `reader.load`.
    num_heads_text: of BERT, which no shape tells; None: of 64 each.

  Raises:
    FileNotFoundError, ValueError: see `reader.load` and `rules.from_theirs`.
  """
  tensors, prefix, scanned = flax_file.read(path)
  described = _described(tensors, f"{path} is no LiT of vit_jax or big_vision")
  sizes, norm = {}, f"{BERT}layer_norm/scale"
  if described.text == "bert":
    sizes["N"] = towers.heads(tensors, norm, num_heads_text, "num_heads_text")
  params = rules.from_theirs(
    tensors, _table(described), sizes=sizes, what=f"the LiT file {path}"
  )
  return Checkpoint(params, prefix, described.images, scanned)


def save(path: str | os.PathLike, checkpoint: Checkpoint) -> None:
  """Writes a .npz file; what `load` read comes back bit by bit."""
  tensors = export(checkpoint.params, images=checkpoint.images)
  if checkpoint.scanned:
    tensors = flax_file.stacked(tensors)
  reader.save(path, {f"{checkpoint.prefix}{k}": x for k, x in tensors.items()})


def export(
  params: Mapping[str, Any], *, images: str = "vit_jax"
) -> dict[str, np.ndarray]:
  """A tree of the parameters' shape as {their name: array}, without a prefix."""
  described, sizes = _of_tree(params, images)
  what = "the model, as a LiT of vit_jax,"
  tensors = rules.to_theirs(params, _table(described), sizes=sizes, what=what)
  return flax_file.without_row(tensors) if images == "big_vision" else tensors


def of_model(model: Any, params: Mapping[str, Any]) -> Checkpoint:
  """Both towers of a trained model of LiT's kind, without what is `dual.BESIDE` them.

  Args:
    model: the VLM. params: its pretrainer's, arrays without boxes.

  Raises:
    ValueError: it is of another kind; lists the fields.
  """
  kept = dual.towers_of(params)
  described, _ = _of_tree(kept, "vit_jax")
  made_with_lib.check(model, MADE_WITH[described.text], "a LiT of vit_jax")
  return Checkpoint(kept)


def init(
  abstract_params: Mapping[str, Any],
  *,
  path: str | os.PathLike,
  skip: Sequence[str] = (),
  fresh: Sequence[str] = (),
  model: Any = None,
  made_with: made_with_lib.Told | None = None,
) -> dict[str, Any]:
  """Parameters of a model: `c.init = dict(type="lit", path="LiT-B16B_2.npz")`.

  The table of image positions is resized to the model's grid, bicubic.

  Arguments and errors as of `big_vision.init`.
  """
  tensors, _, _ = flax_file.read(path)
  described = _described(tensors, f"{path} is no LiT of vit_jax or big_vision")
  made_with_lib.check(model, MADE_WITH[described.text], path, made_with)
  _, sizes = _of_tree(abstract_params, described.images)
  return rules.from_theirs(
    tensors,
    _table(described),
    sizes=sizes,
    shapes=abstract_params,
    skip=skip,
    fresh=fresh,
    what=f"the LiT file {path}, for this model,",
  )


@dataclasses.dataclass(frozen=True)
class _Described:
  """What the rules have to know: depths, one of IMAGES and of WORDS."""

  image_depth: int
  text_depth: int
  images: str
  text: str
  image_head: bool
  text_head: bool


def _described(tensors, what):
  """Of a file's names."""
  block = "img/Transformer/encoderblock_0/"
  images = "vit_jax"
  if f"{block}{augreg.OLD[1]}/query/kernel" in tensors:
    images = "before_linen"
  elif "img/pos_embedding" in tensors:
    images = "big_vision"
  text = "bert" if WORDS["bert"] in tensors else "transformer"
  layer = dict(bert=LAYER, transformer=f"txt/Encoder_0/{big_vision.BLOCK}")[text]
  return _Described(
    image_depth=towers.depth(tensors, f"img/{augreg.BLOCK}", what),
    text_depth=towers.depth(tensors, layer, what),
    images=images,
    text=text,
    image_head="img/head/kernel" in tensors,
    text_head="txt/head/kernel" in tensors,
  )


def _of_tree(params, images):
  """(described, sizes) of a tree of ours."""
  leaves = tree_lib.flatten(params)
  query = "model/{}/blocks/attn/query/kernel"
  wanted = [query.format("image"), query.format("text"), layout.PATCH]
  refusal = "this model is not of LiT's kind (a ViT and a text encoder)"
  image, text, patch = layout.shapes(params, wanted, refusal).values()
  described = _Described(
    image_depth=image[0],
    text_depth=text[0],
    images=images,
    text="bert" if "model/text/type/embedding" in leaves else "transformer",
    image_head="model/image_proj/kernel" in leaves,
    text_head="model/text_proj/kernel" in leaves,
  )
  return described, dict(M=image[2], N=text[2], **layout.sides(patch))


def _table(described):
  names, same = IMAGES[described.images], augreg.same
  table = augreg.tower_rules(
    "model/image", described.image_depth, start="img/", names=names
  )
  if described.image_head:
    table += same("img/head/", "model/image_proj", kernel="W E", bias="E")
  if described.text == "bert":
    table += bert_rules("model/text", described.text_depth)
  else:
    words, positions = WORDS["transformer"], "txt/pos_embedding"
    own = towers.table_rules(words, positions, "model/text")
    own[1] = dataclasses.replace(own[1], axes="1 T D -> T D")
    blocks = big_vision.block_rules(
      "txt/Encoder_0/", "model/text", described.text_depth
    )
    table += [*own, *rules.relabel(blocks, towers.TEXT_LETTERS)]
  if described.text_head:
    table += same("txt/head/", "model/text_proj", kernel="D E", bias="E")
  return [*table, rules.Rule("t", "model/log_scale", "1 ->")]


def bert_rules(ours: str, depth: int) -> rules.Table:
  """flaxformer's BertEncoder (sizes D F N H T K V)."""
  layers, blocks, same = range(depth), f"{ours}/blocks", augreg.same
  attention, mlp = f"{LAYER}attention_block/", f"{LAYER}mlp_block/"
  ends = dict(scale="D", bias="D")
  table = [
    rules.Rule(
      f"{BERT}embedder/embedders_{theirs}_ids/embedding",
      f"{ours}/{name}/embedding",
      f"{rows} D -> {rows} D",
    )
    for theirs, name, rows in (
      ("token", "word", "V"),
      ("position", "position", "T"),
      ("segment", "type", "K"),
    )
  ]
  for name in ("query", "key", "value"):
    theirs, own = f"{attention}attention_layer/{name}/", f"{blocks}/attn/{name}"
    table += [
      rules.Rule(f"{theirs}kernel", f"{own}/kernel", "D (N H) -> D N H", layers),
      rules.Rule(f"{theirs}bias", f"{own}/bias", "(N H) -> N H", layers),
    ]
  out, own = f"{attention}dense_layer/", f"{blocks}/attn/out"
  up, down = f"{mlp}mlp/dense_layer/", f"{mlp}dense_layer/"
  return [
    *table,
    *same(f"{BERT}layer_norm/", f"{ours}/norm", **ends),
    rules.Rule(f"{out}kernel", f"{own}/kernel", "(N H) D -> N H D", layers),
    rules.Rule(f"{out}bias", f"{own}/bias", "D -> D", layers),
    *same(f"{attention}layer_norm/", f"{blocks}/norm_attn", layers, **ends),
    *same(up, f"{blocks}/mlp/up", layers, kernel="D F", bias="F"),
    *same(down, f"{blocks}/mlp/down", layers, kernel="F D", bias="D"),
    *same(f"{mlp}layer_norm/", f"{blocks}/norm_mlp", layers, **ends),
  ]
