"""Official VLP checkpoints (LuoweiZhou/VLP, pytorch_pretrained_bert/modeling.py).

BertForPreTrainingLossMask: one BERT over regions and words, and its head of masked
words, which writes captions too.
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


Checkpoint = layout.Checkpoint


def load(
  path: str | os.PathLike, *, num_heads: int | None = None, key: str | None = None
) -> Checkpoint:
  """Reads an official file, model.<epoch>.bin; see `vilt.load` for the arguments."""
  tensors = reader.load(path, key=key)
  return Checkpoint(LAYOUT.read(tensors, path, num_heads=num_heads))


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
  """Parameters of a model from an official file: `c.init = dict(type="vlp", path=…)`.

  Arguments and errors as of `vilt.init`.
  """
  made_with_lib.check(model, MADE_WITH, path, made_with)
  read = lambda: reader.load(path, key=key)
  return LAYOUT.fit(read, path, abstract_params, skip=skip, fresh=fresh)


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


LAYOUT = layout.Layout(
  words=layout.words("VLP", "regions, words and one stream"),
  table=_rules,
  stacks=dict(
    layers=layout.Stack(
      theirs="bert.encoder.layer.{i}.",
      query="model/fusion/blocks/attn/query/kernel",
      letter="N",
      norm="bert.embeddings.LayerNorm.weight",
    )
  ),
  paths=("model/image/fc1/kernel",),
)
