"""Official VLMo checkpoints (microsoft/unilm, vlmo/modules/vlmo_module.py).

Of any stage, or with the head of a task. Base and large have one table of biases by
distance for all layers, which ours have each for itself; base-plus has positions in its
place. Their keys have no bias: ours, which changes no attention, is zero, and is not
written. The contrast of the experts of pairs, BERT's own table of positions where it is
not read, and indices into the table of distances lie in `Checkpoint.unused`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import os
import re
from typing import Any

import numpy as np
import scipy.interpolate

from vlp_jax.interop import layout
from vlp_jax.interop import made_with as made_with_lib
from vlp_jax.interop import reader
from vlp_jax.interop import rules
from vlp_jax.interop import towers
from vlp_jax.interop import vilt
from vlp_jax.ops import distance
from vlp_jax.ops import tree as tree_lib

# Sizes: those of `towers`, with the width W of all, R types, P of the pooled pair, E of
# the contrastive space; A lower and B upper layers, S rows of distances.

BLOCK = "transformer.blocks.{i}."
SIGNATURE = (
  r"transformer\.blocks\.0\.mlp_text\.fc1\.weight",
  r"text_embeddings\.word_embeddings\.weight",
)
TABLE = "relative_position_bias_table"
POSITIONS = r"text_embeddings\.position_(ids|embeddings\.weight)"
UNUSED = (
  r"itc_vl_(text|image)_proj\..*",
  "logit_vl_scale",
  r"(text_|text_imag_)?relative_position_index",
)
# What a model may have that their files do not.
BESIDE = r"model/image/mask|model/codebook/.*|objectives_mim/.*"
EXPERTS = {"text": "text", "imag": "image"}
STACKS = {"lower": "A", "upper": "B"}
HEADS = {k: v for k, v in vilt.HEADS.items() if k != "text_rank"}
CONTRAST = {
  "itc_text_proj.fc.weight": "model/text_proj/kernel",
  "itc_image_proj.fc.weight": "model/image_proj/kernel",
}
# multiway_transformer.py; BertEmbeddings with the defaults of its config.
MADE_WITH = made_with_lib.of(
  text=dict(norm_eps=1e-12), fusion=made_with_lib.TIMM | dict(pool="tanh")
)


Checkpoint = layout.Carrying


def load(
  path: str | os.PathLike, *, num_heads: int | None = None, key: str | None = None
) -> Checkpoint:
  """Reads an official file.

  Args:
    path: see `reader.load`, also for `key`.
    num_heads: of base-plus, which no shape tells; None: of 64 each.

  Raises:
    FileNotFoundError, ValueError: see `reader.load` and `rules.from_theirs`.
  """
  tensors = reader.load(path, key=key)
  described = _described(tensors, f"{path} is no VLMo checkpoint")
  heads = num_heads
  if described.distances:
    heads = tensors[TABLE].shape[-1] // described.depth
  heads = towers.heads(tensors, "transformer.norm.weight", heads, "num_heads")
  params = rules.from_theirs(
    _cut(tensors, described),
    _rules(described),
    sizes=dict(M=heads),
    skip=_unused(described),
    what=f"the VLMo checkpoint {path}",
  )
  left = {k: x for k, x in tensors.items() if rules.matches(k, _unused(described))}
  return Checkpoint(params, left)


def save(
  path: str | os.PathLike, checkpoint: Checkpoint, *, key: str | None = None
) -> None:
  """Writes an official file; what `load` read comes back bit by bit.

  Args:
    path: .pt, .pth, .ckpt or .safetensors, see `reader.save`.
    checkpoint: parameters without boxes. Without `unused` the file lacks tensors that
      the official code loads past (strict=False).
    key: of the dictionary around the tensors; not for .safetensors.
  """
  reader.save(path, export(checkpoint.params) | checkpoint.unused, key=key)


def export(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """A tree of the parameters' shape (or of gradients) as {official name: tensor}."""
  described, sizes = _of_tree(params)
  tensors = rules.to_theirs(params, _rules(described), sizes=sizes)
  if described.distances:
    parts = [tensors.pop(name) for name in _parts(described)]
    tensors[TABLE] = np.concatenate(parts, axis=1)
  return tensors


def of_model(model: Any, params: Mapping[str, Any]) -> Checkpoint:
  """A trained model of VLMo's kind, without what is `BESIDE` it.

  Args:
    model: the VLM. params: its pretrainer's, arrays without boxes.

  Raises:
    ValueError: it is of another kind; lists the fields.
  """
  made_with_lib.check(model, MADE_WITH, "a model of VLMo")
  leaves = tree_lib.flatten(params)
  kept = {k: x for k, x in leaves.items() if not re.fullmatch(BESIDE, k)}
  return Checkpoint(rules.nest(kept))


def init(
  abstract_params: Mapping[str, Any],
  *,
  path: str | os.PathLike,
  key: str | None = None,
  skip: Sequence[str] = (),
  fresh: Sequence[str] = (),
  words: int = 196,
  model: Any = None,
  made_with: made_with_lib.Told | None = None,
) -> dict[str, Any]:
  """Parameters of a model from an official file: `c.init = dict(type="vlmo", path=…)`.

  The biases by distance are resized to the model's grid as the official code does it
  (`resize_distances`), base-plus's positions bicubic.

  words: the longest text of the table of distances (max_text_len_of_initckpt). Other
  arguments and errors as of `vilt.init`.
  """
  made_with_lib.check(model, MADE_WITH, path, made_with)
  described, sizes = _of_tree(abstract_params)
  tensors = reader.load(path, key=key)
  return rules.from_theirs(
    _cut(tensors, described),
    _rules(described, words=words),
    sizes=sizes,
    shapes=abstract_params,
    skip=(*_unused(described), *skip),
    fresh=(BESIDE, *fresh),
    what=f"the VLMo checkpoint {path}, for this model,",
  )


def resize_distances(table: np.ndarray, rows: int, *, words: int) -> np.ndarray:
  """A table of biases by distance for another grid, as vlmo_module.py does it.

  Their places are taken to lie on a geometric series that ends where the new grid does;
  a cubic spline through them is read at its whole numbers.

  Args:
    table: float [A, S, M], rows as of `distance.rows`.
    rows: S of the new table. words: of both.

  Raises:
    ValueError: one of them is of no square grid.
  """
  old = 2 * distance.side_of(table.shape[1], words) - 1
  new = 2 * distance.side_of(rows, words) - 1
  if old == new:
    return table
  low, high = 1.01, 1.5
  while high - low > 1e-6:
    ratio = (low + high) / 2
    if (1.0 - ratio ** (old // 2)) / (1.0 - ratio) > new // 2:
      high = ratio
    else:
      low = ratio
  steps = np.cumsum(ratio ** np.arange(old // 2))
  at = np.concatenate([-steps[::-1], [0.0], steps])
  wanted = np.arange(-(new // 2), new // 2 + 1.0)
  order = min(3, old - 1)  # A cubic wants four places, which 2 x 2 patches have not.
  patches, rest = table[:, : old**2], table[:, old**2 :]
  moved = np.empty((len(table), new**2, table.shape[2]), table.dtype)
  for layer, head in np.ndindex(len(table), table.shape[2]):
    square = np.asarray(patches[layer, :, head], np.float64).reshape(old, old)
    spline = scipy.interpolate.RectBivariateSpline(at, at, square, kx=order, ky=order)
    moved[layer, :, head] = spline(wanted, wanted).reshape(-1)
  return np.concatenate([moved, rest], axis=1)


@dataclasses.dataclass(frozen=True)
class _Described:
  """What the rules have to know. pairs: layers with an expert of pairs."""

  depth: int
  pairs: int
  distances: bool
  scaled: bool
  heads: tuple[str, ...]
  contrast: tuple[str, ...]
  temperature: bool
  pooled: bool = True

  @property
  def layers(self) -> dict[str, range]:
    """Of each stack."""
    below = self.depth - self.pairs
    stacks = {"lower": range(below), "upper": range(below, self.depth)}
    return {name: layers for name, layers in stacks.items() if layers}


def _described(tensors, what):
  depth = towers.depth(tensors, BLOCK, what)
  has = lambda i: f"{BLOCK.format(i=i)}mlp_vl.fc1.weight" in tensors
  return _Described(
    depth=depth,
    pairs=sum(map(has, range(depth))),
    distances=TABLE in tensors,
    scaled=f"{BLOCK.format(i=0)}gamma_1" in tensors,
    heads=tuple(h for h, theirs in HEADS.items() if f"{theirs}weight" in tensors),
    contrast=tuple(name for name in CONTRAST if name in tensors),
    temperature="logit_scale" in tensors,
    pooled="pooler.dense.weight" in tensors,
  )


def _of_tree(params):
  """(described, sizes) of a tree of ours."""
  leaves = tree_lib.flatten(params)
  query = "model/fusion/{}/blocks/attn/query/kernel"
  wanted = [query.format("lower"), "model/fusion/lower/blocks/mlp_text/up/kernel"]
  refusal = (
    "this model is not of VLMo's kind (one stack, an expert of each modality, one"
    " attention)"
  )
  found = layout.shapes(params, [*wanted, layout.PATCH], refusal)
  below, _, heads, _ = found[wanted[0]]
  upper = leaves.get(query.format("upper"))
  pairs = 0 if upper is None else upper.shape[0]
  described = _Described(
    depth=below + pairs,
    pairs=pairs,
    distances="model/fusion/lower/blocks/attn/distance" in leaves,
    scaled="model/fusion/lower/blocks/scale_attn" in leaves,
    heads=tuple(name for name in HEADS if f"objectives_{name}" in params),
    contrast=tuple(name for name, ours in CONTRAST.items() if ours in leaves),
    temperature="model/log_scale" in leaves,
    pooled="model/fusion/pool/dense/kernel" in leaves,
  )
  return described, dict(layout.sides(found[layout.PATCH]), M=heads, A=below, B=pairs)


def _unused(described):
  return (*UNUSED, POSITIONS) if described.distances else UNUSED


def _parts(described):
  """Names of the parts of the table of distances, one a stack."""
  return [f"{TABLE}.{stack}" for stack in described.layers]


def _cut(tensors, described):
  """The tensors, with the table of distances in parts."""
  table = tensors.get(TABLE)
  if table is None or not described.distances or table.ndim != 2:
    return tensors
  below = len(described.layers["lower"])
  cuts = np.split(table, [table.shape[1] * below // described.depth], axis=1)
  rest = {name: x for name, x in tensors.items() if name != TABLE}
  return rest | dict(zip(_parts(described), cuts, strict=False))


def _rules(described, *, words=None):
  image, text, fusion = "model/image", "model/text", "model/fusion"
  # With distances there is no other position.
  added = (r"transformer\.pos_embed", POSITIONS) if described.distances else ()
  embeddings = [
    *towers.vit_embedding_rules("transformer.", image),
    *rules.relabel(towers.bert_embedding_rules("text_embeddings.", text), {"D": "W"}),
  ]
  table = [rule for rule in embeddings if not rules.matches(rule.theirs, added)]
  table += [
    rules.Rule(
      "text_embeddings.word_embeddings.weight", f"{text}/word/embedding", "V W -> V W"
    ),
    rules.Rule(
      "token_type_embeddings.weight",
      f"{fusion}/type/embedding",
      "R W -> R W",
      fit=vilt.second_image,
    ),
    *towers.norm_rules("transformer.norm.", f"{fusion}/norm", "W"),
  ]
  for stack, layers in described.layers.items():
    table += _layers(f"{fusion}/{stack}/blocks", layers, stack, described, words)
  if described.pooled:
    table += towers.linear_rules("pooler.dense.", f"{fusion}/pool/dense", "W", "W'")
  for name in described.contrast:
    table.append(rules.Rule(name, CONTRAST[name], "E W -> W E"))
  if described.temperature:
    table.append(rules.Rule("logit_scale", "model/log_scale", "->"))
  return [*table, *(r for head in described.heads for r in vilt.head_rules(head, "W"))]


def _layers(ours, layers, stack, described, words):
  """One stack's (sizes W G M h)."""
  at = f"{ours}/attn"
  table = [
    *towers.norm_rules(f"{BLOCK}norm1.", f"{ours}/norm_attn", "W", layers),
    *towers.beit_attention_rules(f"{BLOCK}attn.", at, layers),
  ]
  for theirs, name in {"gamma_1": "scale_attn", "gamma_2": "scale_mlp"}.items():
    if described.scaled:
      table.append(rules.Rule(f"{BLOCK}{theirs}", f"{ours}/{name}", "W -> W", layers))
  if described.distances:
    count = STACKS[stack]
    fit = None if words is None else functools.partial(_fit, words=words)
    axes = f"S ({count} M) -> {count} S M"
    table.append(rules.Rule(f"{TABLE}.{stack}", f"{at}/distance", axes, fit=fit))
  experts = EXPERTS | ({"vl": "pair"} if stack == "upper" else {})
  for theirs, name in experts.items():
    norm, mlp = f"{BLOCK}norm2_{theirs}.", f"{BLOCK}mlp_{theirs}."
    table += [
      *towers.norm_rules(norm, f"{ours}/norm_mlp_{name}", "W", layers),
      *towers.linear_rules(f"{mlp}fc1.", f"{ours}/mlp_{name}/up", "W", "G", layers),
      *towers.linear_rules(f"{mlp}fc2.", f"{ours}/mlp_{name}/down", "G", "W", layers),
    ]
  return table


def _fit(table, shape, *, words):
  return resize_distances(table, shape[1], words=words)
