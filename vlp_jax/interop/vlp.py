"""Official VLP checkpoints (LuoweiZhou/VLP, pytorch_pretrained_bert/modeling.py).

BertForPreTrainingLossMask: one BERT over regions and words, and its head of masked
words, which writes captions too.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import os
from typing import Any

import numpy as np

from vlp_jax.interop import made_with as made_with_lib
from vlp_jax.interop import reader
from vlp_jax.interop import rules
from vlp_jax.interop import towers
from vlp_jax.ops import tree as tree_lib

# Sizes: those of `towers` for text, with the features C of a region, Z of the layer
# behind them, P numbers of its place.

# A checkpoint of this format has tensors of these names.
SIGNATURE = (
  r"bert\.encoder\.layer\.0\..*",
  r"vis_embed\.0\.weight",
  r"vis_pe_embed\.0\.weight",
)
# modeling.py BertLayerNorm, whose epsilon no config says.
MADE_WITH = made_with_lib.of(fusion=dict(act="gelu", norm_eps=1e-5))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What an official file holds: params, a tree of ours."""

  params: dict[str, Any]


def load(
  path: str | os.PathLike, *, num_heads: int | None = None, key: str | None = None
) -> Checkpoint:
  """Reads an official file, model.<epoch>.bin.

  Args:
    path: see `reader.load`, also for `key`.
    num_heads: which no shape tells; None: of 64 each, as in all that is published.

  Raises:
    FileNotFoundError, ValueError: see `reader.load` and `rules.from_theirs`.
  """
  tensors = reader.load(path, key=key)
  layers = towers.depth(
    tensors, "bert.encoder.layer.{i}.", f"{path} is no VLP checkpoint"
  )
  norm = "bert.embeddings.LayerNorm.weight"
  params = rules.from_theirs(
    tensors,
    _rules(layers),
    sizes=dict(N=towers.heads(tensors, norm, num_heads, "num_heads")),
    what=f"the VLP checkpoint {path}",
  )
  return Checkpoint(params)


def save(
  path: str | os.PathLike, checkpoint: Checkpoint, *, key: str | None = None
) -> None:
  """Writes an official file; what `load` read comes back bit by bit.

  Args:
    path: .bin, .pth or .safetensors, see `reader.save`.
    checkpoint: parameters without boxes.
    key: the official files have none.
  """
  reader.save(path, export(checkpoint.params), key=key)


def export(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """A tree of the parameters' shape (or of gradients) as {official name: tensor}."""
  table, sizes = _table(params)
  return rules.to_theirs(params, table, sizes=sizes)


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
  """Parameters of a model from an official file: `c.init = dict(type="vlp", path=…)`.

  Args:
    abstract_params: the model's tree, without boxes; leaves have shape and dtype.
    path, key: see `reader.load`.
    skip: regular expressions of whole names in the file that the model does not use.
    fresh: of whole paths of the model that the file does not have.
    model, made_with: see `made_with.check`; None: not compared.

  Raises:
    FileNotFoundError, ValueError: one error that lists all that does not fit.
  """
  made_with_lib.check(model, MADE_WITH, path, made_with)
  table, sizes = _table(abstract_params)
  return rules.from_theirs(
    reader.load(path, key=key),
    table,
    sizes=sizes,
    shapes=abstract_params,
    skip=skip,
    fresh=fresh,
    what=f"the VLP checkpoint {path}, for this model,",
  )


def _rules(layers):
  image, words, fusion = "model/image", "model/text", "model/fusion"
  embeddings, head = "bert.embeddings.", "cls.predictions."
  return [
    rules.Rule(
      (f"{embeddings}word_embeddings.weight", f"{head}decoder.weight"),
      f"{words}/word/embedding",
      "V D -> V D",
    ),
    rules.Rule(
      f"{embeddings}position_embeddings.weight",
      f"{words}/position/embedding",
      "T D -> T D",
      fit=_refuse_length,
    ),
    rules.Rule(
      f"{embeddings}token_type_embeddings.weight",
      f"{fusion}/type/embedding",
      "K D -> K D",
    ),
    *towers.norm_rules(f"{embeddings}LayerNorm.", f"{fusion}/norm", "D"),
    *towers.bert_layer_rules("bert.encoder.layer.", f"{fusion}/blocks", range(layers)),
    *towers.linear_rules("bert.pooler.dense.", f"{fusion}/pool/dense", "D", "D'"),
    *towers.bert_mlm_rules(head, "objectives_mlm", decoder_bias=False),
    *towers.linear_rules("vis_embed.0.", f"{image}/fc1", "C", "Z"),
    *towers.linear_rules("vis_embed.2.", f"{image}/fc2", "Z", "D"),
    *towers.linear_rules("vis_pe_embed.0.", f"{image}/place", "P", "D"),
  ]


def _refuse_length(table, shape):
  raise ValueError(f"say model.text.length={table.shape[0]} (not {shape[0]})")


def _table(params):
  """(table, sizes) of a tree of ours."""
  leaves = tree_lib.flatten(params)
  query, regions = "model/fusion/blocks/attn/query/kernel", "model/image/fc1/kernel"
  missing = [path for path in (query, regions) if path not in leaves]
  if missing:
    raise ValueError(
      "this model is not of VLP's kind (regions, words and one stream): it has no"
      f" {', '.join(missing)}."
    )
  layers, _, heads, _ = leaves[query].shape
  return _rules(layers), dict(N=heads)
