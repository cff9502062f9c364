"""Rules for the layers that several formats share: torch's, timm's ViT, BERT.

`theirs` is a prefix of names and ends with a dot; `ours` is a path. Sizes. Image:
W width, G mlp, M heads, h head_dim, L tokens, p q patch. Text: D width, F mlp, N heads,
H head_dim, T positions, K types, V words.
"""

from collections.abc import Callable, Iterable, Mapping
import re
from typing import Any

import numpy as np

from vlp_jax.interop import rules
from vlp_jax.ops import posembed

HEAD_DIM = 64  # of ViT-S, B and L, BERT, RoBERTa
# From the letters of the image tower to those of the text tower.
TEXT_LETTERS = {"W": "D", "G": "F", "M": "N", "h": "H"}


def heads(tensors: Mapping[str, Any], norm: str, given: int | None, option: str) -> int:
  """How many heads a tower has: what is given, or heads of 64.

  Args:
    tensors: name to array. norm: name of one that is as long as the tower is wide.
    given: None: not said. option: how it is said, for the message.
  """
  if given is not None or norm not in tensors:
    return given or 1  # Without its tensors the tower is missing, which is told.
  (width,) = tensors[norm].shape
  if width % HEAD_DIM:
    raise ValueError(
      f"{norm} is of width {width}, not a multiple of {HEAD_DIM}; no tensor tells how"
      f" many heads there are: say {option}=… (vlp-jax convert: --set {option}=…)"
    )
  return width // HEAD_DIM


def depth(names: Iterable[str], layer: str, what: str) -> int:
  """One more than the highest `{i}` of `layer`, a prefix of names.

  Raises:
    ValueError: there is none; `what` says of the file what it is not.
  """
  before, after = (re.escape(part) for part in layer.split("{i}"))
  found = [re.match(rf"{before}(\d+){after}", name) for name in names]
  numbers = [int(match[1]) for match in found if match]
  if not numbers:
    raise ValueError(f"{what}: it has no tensor {layer.format(i=0)}…")
  return 1 + max(numbers)


def linear_rules(
  theirs: str, ours: str, into: str, out: str, layers: range | None = None
) -> rules.Table:
  """A linear layer of torch, whose weight is [out, into]."""
  return [
    rules.Rule(
      f"{theirs}weight", f"{ours}/kernel", f"{out} {into} -> {into} {out}", layers
    ),
    rules.Rule(f"{theirs}bias", f"{ours}/bias", f"{out} -> {out}", layers),
  ]


def norm_rules(
  theirs: str, ours: str, width: str, layers: range | None = None
) -> rules.Table:
  """A layer norm of torch."""
  return [
    rules.Rule(f"{theirs}weight", f"{ours}/scale", f"{width} -> {width}", layers),
    rules.Rule(f"{theirs}bias", f"{ours}/bias", f"{width} -> {width}", layers),
  ]


def posembed_rule(theirs: str, ours: str, prefix: int = 1) -> rules.Rule:
  """A ViT's table of positions, which is resized to the model's grid (sizes L W).

  prefix: its rows before those of the patches.
  """
  return rules.Rule(theirs, ours, "1 L W -> L W", fit=resize_to(prefix))


def vit_rules(
  theirs: str,
  ours: str,
  depth: int,
  *,
  class_token: bool = True,
  distilled: bool = False,
) -> rules.Table:
  """A Vision Transformer of timm (sizes W G M h L p q)."""
  return [
    *vit_embedding_rules(theirs, ours, class_token=class_token, distilled=distilled),
    *vit_block_rules(theirs, ours, depth),
  ]


def vit_embedding_rules(
  theirs: str,
  ours: str,
  fit: Any = None,
  *,
  class_token: bool = True,
  distilled: bool = False,
) -> rules.Table:
  """Its patches, positions and class token (sizes W L p q).

  fit: of the table of positions, see `rules.Rule`; None: resized, bicubic.
  distilled: with DeiT's token of distillation behind the class token.
  """
  fit = fit or resize_to(int(class_token) + int(distilled))
  table = [
    rules.Rule(f"{theirs}pos_embed", f"{ours}/posemb", "1 L W -> L W", fit=fit),
    rules.Rule(
      f"{theirs}patch_embed.proj.weight", f"{ours}/patch/kernel", "W 3 p q -> (p q 3) W"
    ),
    rules.Rule(f"{theirs}patch_embed.proj.bias", f"{ours}/patch/bias", "W -> W"),
  ]
  if distilled:
    table.insert(0, rules.Rule(f"{theirs}dist_token", f"{ours}/dist", "1 1 W -> W"))
  if class_token:
    return [rules.Rule(f"{theirs}cls_token", f"{ours}/cls", "1 1 W -> W"), *table]
  return table


def vit_block_rules(
  theirs: str, ours: str, depth: int, *, beit: bool = False
) -> rules.Table:
  """Its blocks and the norm after them (sizes W G M h).

  beit: microsoft/unilm's, whose keys have no bias, and whose norm is `fc_norm`.
  """
  layers = range(depth)
  block, blocks = f"{theirs}blocks.{{i}}.", f"{ours}/blocks"
  attention = beit_attention_rules if beit else _vit_attention
  return [
    *norm_rules(f"{block}norm1.", f"{blocks}/norm_attn", "W", layers),
    *attention(f"{block}attn.", f"{blocks}/attn", layers),
    *norm_rules(f"{block}norm2.", f"{blocks}/norm_mlp", "W", layers),
    *linear_rules(f"{block}mlp.fc1.", f"{blocks}/mlp/up", "W", "G", layers),
    *linear_rules(f"{block}mlp.fc2.", f"{blocks}/mlp/down", "G", "W", layers),
    *norm_rules(f"{theirs}{'fc_norm' if beit else 'norm'}.", f"{ours}/norm", "W"),
  ]


def beit_attention_rules(theirs: str, ours: str, layers: range) -> rules.Table:
  """Attention of microsoft/unilm's BEiT, BEiT v2 and VLMo (sizes W M h).

  Their keys have no bias: ours, which changes no attention, is zero, and not written.
  """
  bias = "(M h) -> M h"
  zeros = lambda sizes: np.zeros((len(layers), sizes["M"], sizes["h"]), np.float32)
  return [
    _vit_qkv(theirs, ours, layers, "weight", "kernel", "(3 M h) W -> 3 W M h"),
    rules.Rule(f"{theirs}q_bias", f"{ours}/query/bias", bias, layers),
    rules.Fill(f"{ours}/key/bias", zeros),
    rules.Rule(f"{theirs}v_bias", f"{ours}/value/bias", bias, layers),
    *_vit_out(theirs, ours, layers),
  ]


def _vit_attention(theirs, ours, layers):
  return [
    _vit_qkv(theirs, ours, layers, "weight", "kernel", "(3 M h) W -> 3 W M h"),
    _vit_qkv(theirs, ours, layers, "bias", "bias", "(3 M h) -> 3 M h"),
    *_vit_out(theirs, ours, layers),
  ]


def _vit_qkv(theirs, ours, layers, leaf, own, axes):
  paths = tuple(f"{ours}/{name}/{own}" for name in _QKV)
  return rules.Rule(f"{theirs}qkv.{leaf}", paths, axes, layers)


def _vit_out(theirs, ours, layers):
  weight, bias = f"{theirs}proj.weight", f"{theirs}proj.bias"
  return [
    rules.Rule(weight, f"{ours}/out/kernel", "W (M h) -> M h W", layers),
    rules.Rule(bias, f"{ours}/out/bias", "W -> W", layers),
  ]


def clip_vit_rules(
  theirs: str,
  ours: str,
  depth: int,
  *,
  pooled: str = "W",
  how: posembed.How = "bicubic",
) -> rules.Table:
  """The Vision Transformer of OpenAI's CLIP without its projection (W G M h L p q).

  pooled: the width of its last norm, which CoCa's pooling makes another. how: its table
  of positions is resized, see `resize_to`.
  """
  return [
    rules.Rule(f"{theirs}class_embedding", f"{ours}/cls", "W -> W"),
    rules.Rule(
      f"{theirs}positional_embedding",
      f"{ours}/posemb",
      "L W -> L W",
      fit=resize_to(1, how=how),
    ),
    rules.Rule(f"{theirs}conv1.weight", f"{ours}/patch/kernel", "W 3 p q -> (p q 3) W"),
    *norm_rules(f"{theirs}ln_pre.", f"{ours}/norm_pre", "W"),
    *resblock_rules(f"{theirs}transformer.resblocks.", f"{ours}/blocks", depth),
    *norm_rules(f"{theirs}ln_post.", f"{ours}/norm", pooled),
  ]


def clip_text_rules(theirs: str, ours: str, depth: int) -> rules.Table:
  """The text tower of OpenAI's CLIP without its projection (sizes D F N H T V)."""
  blocks = f"{theirs}transformer.resblocks."
  return [
    *table_rules(
      f"{theirs}token_embedding.weight", f"{theirs}positional_embedding", ours
    ),
    *rules.relabel(resblock_rules(blocks, f"{ours}/blocks", depth), TEXT_LETTERS),
    *norm_rules(f"{theirs}ln_final.", f"{ours}/norm", "D"),
  ]


def table_rules(words: str, positions: str, ours: str) -> rules.Table:
  """The tables of a text tower, each by its name (sizes D T V)."""
  return [
    rules.Rule(words, f"{ours}/word/embedding", "V D -> V D"),
    rules.Rule(
      positions, f"{ours}/position/embedding", "T D -> T D", fit=_refuse_length
    ),
  ]


def resblock_rules(
  theirs: str, ours: str, depth: int, *, mlp: str = "mlp", norm: str = "norm_mlp"
) -> rules.Table:
  """Blocks of OpenAI's CLIP and of open_clip (sizes W G M h).

  mlp, norm: what ours are called.
  """
  layers = range(depth)
  block = f"{theirs}{{i}}."
  return [
    *norm_rules(f"{block}ln_1.", f"{ours}/norm_attn", "W", layers),
    *fused_attention_rules(f"{block}attn.", f"{ours}/attn", layers),
    *norm_rules(f"{block}ln_2.", f"{ours}/{norm}", "W", layers),
    *linear_rules(f"{block}mlp.c_fc.", f"{ours}/{mlp}/up", "W", "G", layers),
    *linear_rules(f"{block}mlp.c_proj.", f"{ours}/{mlp}/down", "G", "W", layers),
  ]


def fused_attention_rules(
  theirs: str, ours: str, layers: range | None = None
) -> rules.Table:
  """torch's `nn.MultiheadAttention` (sizes W M h)."""
  qkv = [tuple(f"{ours}/{c}/{p}" for c in ("query", "key", "value")) for p in _KB]
  weight, bias = f"{theirs}out_proj.weight", f"{theirs}out_proj.bias"
  return [
    rules.Rule(f"{theirs}in_proj_weight", qkv[0], "(3 M h) W -> 3 W M h", layers),
    rules.Rule(f"{theirs}in_proj_bias", qkv[1], "(3 M h) -> 3 M h", layers),
    rules.Rule(weight, f"{ours}/out/kernel", "W (M h) -> M h W", layers),
    rules.Rule(bias, f"{ours}/out/bias", "W -> W", layers),
  ]


def bert_embedding_rules(theirs: str, ours: str) -> rules.Table:
  """BERT's embeddings but for the words, which may be tied (sizes D T K)."""
  return [
    rules.Constant(
      f"{theirs}position_ids", lambda sizes: np.arange(sizes["T"], dtype=np.int64)[None]
    ),
    rules.Rule(
      f"{theirs}position_embeddings.weight",
      f"{ours}/position/embedding",
      "T D -> T D",
      fit=_refuse_length,
    ),
    rules.Rule(
      f"{theirs}token_type_embeddings.weight", f"{ours}/type/embedding", "K D -> K D"
    ),
    *norm_rules(f"{theirs}LayerNorm.", f"{ours}/norm", "D"),
  ]


def bert_layer_rules(
  theirs: str,
  ours: str,
  layers: range,
  *,
  cross: bool = False,
  memory: str = "W",
  shared: bool = False,
) -> rules.Table:
  """Layers of BERT, with cross-attention to the image (sizes D F N H, and W).

  Args:
    theirs, ours, layers: as of all rules; `theirs` may hold the layer, `{i}`.
    cross: with cross-attention, to tokens of the width `memory`.
    shared: keys and values of the cross-attention have rules of their own.
  """
  layer = theirs if "{i" in theirs else f"{theirs}{{i}}."
  table = [
    *_bert_attention(f"{layer}attention.", f"{ours}/attn", "D", layers, _QKV),
    *norm_rules(
      f"{layer}attention.output.LayerNorm.", f"{ours}/norm_attn", "D", layers
    ),
  ]
  if cross:
    theirs = f"{layer}crossattention."
    names = ("query",) if shared else _QKV
    table += _bert_attention(theirs, f"{ours}/cross", memory, layers, names)
    table += norm_rules(f"{theirs}output.LayerNorm.", f"{ours}/norm_cross", "D", layers)
  return [
    *table,
    *linear_rules(f"{layer}intermediate.dense.", f"{ours}/mlp/up", "D", "F", layers),
    *linear_rules(f"{layer}output.dense.", f"{ours}/mlp/down", "F", "D", layers),
    *norm_rules(f"{layer}output.LayerNorm.", f"{ours}/norm_mlp", "D", layers),
  ]


def _bert_attention(theirs, ours, memory, layers, names):
  """Keys and values are of `memory`'s width."""
  table = []
  for name in names:
    width = "D" if name == "query" else memory
    weight, bias = f"{theirs}self.{name}.weight", f"{theirs}self.{name}.bias"
    split = f"(N H) {width} -> {width} N H"
    table += [
      rules.Rule(weight, f"{ours}/{name}/kernel", split, layers),
      rules.Rule(bias, f"{ours}/{name}/bias", "(N H) -> N H", layers),
    ]
  out = f"{theirs}output.dense."
  return [
    *table,
    rules.Rule(f"{out}weight", f"{ours}/out/kernel", "D (N H) -> N H D", layers),
    rules.Rule(f"{out}bias", f"{ours}/out/bias", "D -> D", layers),
  ]


def bert_mlm_rules(theirs: str, ours: str, *, decoder_bias: bool = True) -> rules.Table:
  """BERT's head for masked words but for its decoder, which is tied (sizes D V).

  decoder_bias: the bias lies in the file twice, as the head's and as the decoder's.
  """
  biases = (f"{theirs}bias", f"{theirs}decoder.bias")
  return [
    rules.Rule(
      f"{theirs}transform.dense.weight", f"{ours}/dense/kernel", "D' D -> D D'"
    ),
    rules.Rule(f"{theirs}transform.dense.bias", f"{ours}/dense/bias", "D -> D"),
    *norm_rules(f"{theirs}transform.LayerNorm.", f"{ours}/norm", "D"),
    rules.Rule(biases if decoder_bias else biases[0], f"{ours}/bias", "V -> V"),
  ]


def classifier_rules(theirs: str, ours: str) -> rules.Table:
  """`nn/classifier.py`: linear, norm, GELU, linear (sizes P Z C)."""
  return [
    *linear_rules(f"{theirs}0.", f"{ours}/dense", "P", "Z"),
    *norm_rules(f"{theirs}1.", f"{ours}/norm", "Z"),
    *linear_rules(f"{theirs}3.", f"{ours}/out", "Z", "C"),
  ]


_KB = ("kernel", "bias")
_QKV = ("query", "key", "value")


def resize_to(
  prefix: int, *, how: posembed.How = "bicubic"
) -> Callable[[np.ndarray, tuple[int, ...]], np.ndarray]:
  """What makes a table of positions, `prefix` rows of it no patches, of other shape.

  how: see `posembed.resize_posembed`.
  """

  def resize(table, shape):
    grid = round((shape[0] - prefix) ** 0.5)
    return np.asarray(posembed.resize_posembed(table, grid, prefix=prefix, how=how))

  return resize


def _refuse_length(table, shape):
  raise ValueError(f"say model.text.length={table.shape[0]} (not {shape[0]})")
