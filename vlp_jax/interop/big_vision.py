"""big_vision's .npz files <-> ours: SigLIP, SigLIP 2, and a ViT alone.

https://github.com/google-research/big_vision: models/vit.py, and of
models/proj/image_text two_towers.py, text_transformer.py, naflex_vit.py. Names are
paths of a Flax tree ("params/img/Transformer/encoderblock_0/…"); layers of a scanned
stack lie in one array ("…/encoderblock/…"). Files of a run hold the optimiser too
("opt/…"), which is left out. Vision Transformers of before 2022 are `augreg`'s.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import os
from typing import Any

import numpy as np

from vlp_jax.interop import dual
from vlp_jax.interop import flax_file
from vlp_jax.interop import layout
from vlp_jax.interop import made_with as made_with_lib
from vlp_jax.interop import reader
from vlp_jax.interop import rules
from vlp_jax.interop import towers
from vlp_jax.models import naflex
from vlp_jax.ops import tree as tree_lib

# Sizes: those of `towers`, E embedding, C classes, X pre_logits, A side of a grid.

BLOCK = "encoderblock_{i}/"
# The start of a name, and what every Vision Transformer of today has behind it.
_START = r"(params/|opt/target/|)(img/|)"
SIGNATURE = (
  rf"{_START}embedding/kernel",
  rf"{_START}Transformer/encoderblock(_0|)/MultiHeadDotProductAttention_0/query/kernel",
  rf"!{_START}Transformer/posembed_input/.*",  # lit
  r"!(params/|)txt/BertEncoder_0/.*",  # lit
)
# Flax's LayerNorm and GELU, which nothing in a config changes.
LAYERS = dict(act="gelu_tanh", norm_eps=1e-6, norm="pre")
MADE_WITH = made_with_lib.of(
  image=LAYERS | dict(norm_pre=False),
  text=LAYERS | dict(attention="bidirectional", norm_pre=False),
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What a file holds.

  params: a tree of ours: a model of two towers, or {"model": {"image": …}} with the
    heads "classifier" and "pre_logits".
  prefix: of its names. scanned: the layers of a stack lie in one array. naflex: it
    reads rows of patches (naflex_vit.py), not images.
  """

  params: dict[str, Any]
  prefix: str = "params/"
  scanned: bool = False
  naflex: bool = False


def load(path: str | os.PathLike) -> Checkpoint:
  """Reads a file; its shapes tell the heads.

  Raises:
    FileNotFoundError, ValueError: see `reader.load` and `rules.from_theirs`.
  """
  tensors, prefix, scanned = flax_file.read(path)
  described = _described(tensors, path)
  what = f"the big_vision file {path}"
  params = rules.from_theirs(tensors, _table(described), what=what)
  return Checkpoint(params, prefix, scanned, described.naflex)


def save(path: str | os.PathLike, checkpoint: Checkpoint) -> None:
  """Writes a .npz file that big_vision reads; what `load` read comes back bit by bit.

  A class token's row of the table of positions, which there is none of, is added to it.
  """
  tensors = export(checkpoint.params, rows=checkpoint.naflex)
  if checkpoint.scanned:
    tensors = flax_file.stacked(tensors)
  reader.save(path, {f"{checkpoint.prefix}{k}": x for k, x in tensors.items()})


def export(params: Mapping[str, Any], *, rows: bool = False) -> dict[str, np.ndarray]:
  """A tree of the parameters' shape as {big_vision's name: array}, without a prefix."""
  described, sizes = _of_tree(params, rows)
  what = "the model, as big_vision's two towers or ViT,"
  tensors = rules.to_theirs(params, _table(described), sizes=sizes, what=what)
  return flax_file.without_row(tensors)


def of_model(model: Any, params: Mapping[str, Any]) -> Checkpoint:
  """Both towers of a trained model of SigLIP's kind.

  What is `dual.BESIDE` the towers is left out.

  Args:
    model: the VLM. params: its pretrainer's, arrays without boxes.

  Raises:
    ValueError: it is of another kind; lists the fields.
  """
  made_with_lib.check(model, MADE_WITH, "a model of big_vision")
  rows = isinstance(model.image, naflex.Encoder)
  return Checkpoint(dual.towers_of(params), naflex=rows)


def init(
  abstract_params: Mapping[str, Any],
  *,
  path: str | os.PathLike,
  into: str | None = None,
  skip: Sequence[str] = (),
  fresh: Sequence[str] = (),
  model: Any = None,
  made_with: made_with_lib.Told | None = None,
) -> dict[str, Any]:
  """Parameters of a model: `c.init = dict(type="big_vision", path=…)`.

  The table of image positions is resized to the model's grid as big_vision does it.

  Args:
    abstract_params: the model's tree, without boxes; leaves have shape and dtype.
    path: see `reader.load`.
    into: path of an image tower, which alone is filled, from a ViT or from the image
      tower of two; None: the whole model from two towers, or model/image from a ViT.
    skip: regular expressions of whole names in the file, without its prefix, that the
      model does not use.
    fresh: of whole paths of the model that the file does not have.
    model, made_with: see `made_with.check`; None: not compared.

  Raises:
    FileNotFoundError, ValueError: one error that lists all that does not fit.
  """
  tensors, _, _ = flax_file.read(path)
  described = _described(tensors, path)
  what = f"the big_vision file {path}, for this model,"
  if described.text is None or into is not None:
    into = into or "model/image"
    made = made_with_lib.of(**{into.removeprefix("model/"): LAYERS})
    made_with_lib.check(model, made, path, made_with)
    start = "" if described.text is None else "img/"
    tensors = {k: x for k, x in tensors.items() if k.startswith(start)}
    table = _image_rules(start, into, described)
    left_out = rf"{start}(head|pre_logits)/.*"
    return rules.fill(
      abstract_params,
      [into],
      tensors,
      table,
      skip=(left_out, *skip),
      fresh=fresh,
      what=what,
    )
  made_with_lib.check(model, MADE_WITH, path, made_with)
  return rules.from_theirs(
    tensors,
    _table(described),
    shapes=abstract_params,
    skip=skip,
    fresh=fresh,
    what=what,
  )


@dataclasses.dataclass(frozen=True)
class _Described:
  """What the rules have to know. image, text: depths; a ViT alone has no text."""

  image: int
  text: int | None
  class_token: bool = False
  naflex: bool = False
  map_pool: bool = False
  text_map_pool: bool = False
  image_head: bool = False
  text_head: bool = False
  pre_logits: bool = False
  bias: bool = False


def _described(tensors, path):
  """Of a file's names, and of the shape of its table of positions."""
  start = "img/" if "img/embedding/kernel" in tensors else ""
  what = f"{path} is no SigLIP or ViT of big_vision"
  positions = tensors.get(f"{start}pos_embedding")
  text = None
  if start:
    text = towers.depth(tensors, f"txt/Encoder_0/{BLOCK}", what)
  return _Described(
    image=towers.depth(tensors, f"{start}Transformer/{BLOCK}", what),
    text=text,
    class_token=f"{start}cls" in tensors,
    # [A, A, W] in place of [1, A * A, W], and rows of patches in place of images.
    naflex=positions is not None and tensors[f"{start}embedding/kernel"].ndim == 2,
    map_pool=f"{start}MAPHead_0/probe" in tensors,
    text_map_pool="txt/MAPHead_0/probe" in tensors,
    image_head=f"{start}head/kernel" in tensors,
    text_head="txt/head/kernel" in tensors,
    pre_logits=f"{start}pre_logits/kernel" in tensors,
    bias="b" in tensors,
  )


def _of_tree(params, rows):
  """(described, sizes) of a tree of ours."""
  leaves = tree_lib.flatten(params)
  query, patch = "model/{}/blocks/attn/query/kernel", layout.PATCH
  missing = [p for p in (query.format("image"), patch) if p not in leaves]
  if missing:
    raise ValueError(
      "this model is not of big_vision's kind (a ViT, or one and a text encoder): it"
      f" has no {', '.join(missing)}."
    )
  text = leaves.get(query.format("text"))
  positions = leaves.get("model/image/posemb")
  places = 0 if positions is None else positions.shape[0]
  class_token = "model/image/cls" in leaves
  sizes = layout.sides(leaves[patch].shape)
  described = _Described(
    image=leaves[query.format("image")].shape[0],
    text=None if text is None else text.shape[0],
    class_token=class_token,
    naflex=rows,
    map_pool="model/image/map_pool/probe" in leaves,
    text_map_pool="model/text/map_pool/probe" in leaves,
    image_head=("classifier/kernel" if text is None else "model/image_proj/kernel")
    in leaves,
    text_head="model/text_proj/kernel" in leaves,
    pre_logits="pre_logits/kernel" in leaves,
    bias=dual.BIAS in leaves,
  )
  return described, sizes | dict(A=round(places**0.5))


def _table(described):
  start = "" if described.text is None else "img/"
  table = _image_rules(start, "model/image", described)
  if described.pre_logits:
    table += _same(f"{start}pre_logits/", "pre_logits", kernel="W X", bias="X")
  if described.text is None:
    if described.image_head:
      table += _same("head/", "classifier", kernel="Y C", bias="C")
    return table
  if described.image_head:
    table += _same("img/head/", "model/image_proj", kernel="W E", bias="E")
  blocks = block_rules("txt/Encoder_0/", "model/text", described.text)
  if described.text_map_pool:
    blocks += _pool_rules("txt/MAPHead_0/", "model/text/map_pool")
  table += [
    *towers.table_rules("txt/Embed_0/embedding", "txt/pos_embedding", "model/text"),
    *rules.relabel(blocks, towers.TEXT_LETTERS),
    rules.Rule("t", "model/log_scale", "1 ->"),
  ]
  table = [
    _batched(rule) if rule.theirs == "txt/pos_embedding" else rule for rule in table
  ]
  if described.text_head:
    table += _same("txt/head/", "model/text_proj", kernel="D E", bias="E")
  if described.bias:
    table.append(rules.Rule("b", dual.BIAS, "1 ->"))
  return table


def _batched(rule):
  """A table of positions that has an axis of 1 in front."""
  return dataclasses.replace(rule, axes="1 T D -> T D")


def _image_rules(start, ours, described):
  prefix = int(described.class_token)
  kernel, positions = "p q 3 W -> (p q 3) W", "1 L W -> L W"
  if described.naflex:
    kernel, positions = "K W -> K W", "A A' W -> (A A') W"
  table = [
    rules.Rule(f"{start}embedding/kernel", f"{ours}/patch/kernel", kernel),
    rules.Rule(f"{start}embedding/bias", f"{ours}/patch/bias", "W -> W"),
    rules.Rule(
      f"{start}pos_embedding",
      f"{ours}/posemb",
      positions,
      fit=towers.resize_to(prefix, how="corners"),
    ),
    *block_rules(f"{start}Transformer/", ours, described.image),
  ]
  if described.class_token:
    table.append(rules.Rule(f"{start}cls", f"{ours}/cls", "1 1 W -> W"))
  if described.map_pool:
    table += _pool_rules(f"{start}MAPHead_0/", f"{ours}/map_pool")
  return table


def block_rules(theirs, ours, depth):
  """Encoder (sizes W G M h)."""
  layers, blocks, block = range(depth), f"{ours}/blocks", f"{theirs}{BLOCK}"
  return [
    *_same(f"{theirs}encoder_norm/", f"{ours}/norm", scale="W", bias="W"),
    *_same(f"{block}LayerNorm_0/", f"{blocks}/norm_attn", layers, scale="W", bias="W"),
    *_same(f"{block}LayerNorm_1/", f"{blocks}/norm_mlp", layers, scale="W", bias="W"),
    *_attention_rules(block, f"{blocks}/attn", layers),
    *_mlp_rules(block, f"{blocks}/mlp", layers),
  ]


def _pool_rules(theirs, ours):
  """MAPHead (sizes W G M h)."""
  return [
    rules.Rule(f"{theirs}probe", f"{ours}/probe", "1 1 W -> 1 W"),
    *_attention_rules(theirs, f"{ours}/attn"),
    *_same(f"{theirs}LayerNorm_0/", f"{ours}/norm", scale="W", bias="W"),
    *_mlp_rules(theirs, f"{ours}/mlp"),
  ]


def _attention_rules(theirs, ours, layers=None):
  theirs = f"{theirs}MultiHeadDotProductAttention_0/"
  table = _same(f"{theirs}out/", f"{ours}/out", layers, kernel="M h W", bias="W")
  for name in ("query", "key", "value"):
    sides = dict(kernel="W M h", bias="M h")
    table += _same(f"{theirs}{name}/", f"{ours}/{name}", layers, **sides)
  return table


def _mlp_rules(theirs, ours, layers=None):
  up, down = f"{theirs}MlpBlock_0/Dense_0/", f"{theirs}MlpBlock_0/Dense_1/"
  return [
    *_same(up, f"{ours}/up", layers, kernel="W G", bias="G"),
    *_same(down, f"{ours}/down", layers, kernel="G W", bias="W"),
  ]


def _same(theirs, ours, layers=None, **sides):
  """Leaves that are laid out alike on both sides: {name: axes}."""
  return [
    rules.Rule(f"{theirs}{name}", f"{ours}/{name}", f"{axes} -> {axes}", layers)
    for name, axes in sides.items()
  ]
