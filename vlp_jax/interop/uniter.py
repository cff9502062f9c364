"""Official UNITER checkpoints (ChenRocks/UNITER, model/pretrain.py).

UniterForPretraining: a BERT over words and regions, and the heads of its objectives,
which a config names itm, mlm, mrfr and mrc. Files of before its renaming begin with
`bert.` where others begin with `uniter.`; both are read.
"""

from collections.abc import Mapping, Sequence
import os
from typing import Any

import numpy as np

from vlp_jax.interop import layout
from vlp_jax.interop import reader
from vlp_jax.interop import rules
from vlp_jax.interop import towers

# Sizes: those of `towers` for text, with the features Z of a region, P numbers of its
# place, C classes.

# A checkpoint of this format has tensors of these names.
SIGNATURE = (
  r"(uniter|bert)\.img_embeddings\.img_linear\.weight",
  r"(uniter|bert)\.encoder\.layer\.0\..*",
)
TRUNK, OLD = "uniter.", "bert."
MASK = f"{TRUNK}img_embeddings.mask_embedding.weight"


Checkpoint = layout.Checkpoint


def load(
  path: str | os.PathLike, *, num_heads: int | None = None, key: str | None = None
) -> Checkpoint:
  """Reads an official file, uniter-base.pt; see `vilt.load` for the arguments."""
  tensors = _read(path, key)
  return Checkpoint(LAYOUT.read(tensors, path, num_heads=num_heads))


def save(
  path: str | os.PathLike, checkpoint: Checkpoint, *, key: str | None = None
) -> None:
  """Writes an official file, its names with `uniter.`; `load` gives the same bits.

  Args:
    path: .pt or .safetensors, see `reader.save`.
    checkpoint: parameters without boxes.
    key: the official files have none.
  """
  reader.save(path, export(checkpoint.params), key=key)


def export(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """A tree of the parameters' shape (or of gradients) as {official name: tensor}."""
  tensors = LAYOUT.write(params)
  # The official code fills the row of what is not hidden with zeros before it reads it.
  mask = tensors[MASK]
  tensors[MASK] = np.concatenate([np.zeros_like(mask), mask])
  return tensors


def init(
  abstract_params: Mapping[str, Any],
  *,
  path: str | os.PathLike,
  key: str | None = None,
  skip: Sequence[str] = (),
  fresh: Sequence[str] = (),
) -> dict[str, Any]:
  """Parameters of a model: `c.init = dict(type="uniter", path=…)`.

  Arguments and errors as of `vilt.init`.
  """
  read = lambda: _read(path, key)
  return LAYOUT.fit(read, path, abstract_params, skip=skip, fresh=fresh)


def parameter_rules(layers: int) -> rules.Table:
  """The state dict <-> {"model": …, "objectives_itm": …, …} of ours."""
  image, words, fusion = "model/image", "model/text", "model/fusion"
  embeddings, regions = f"{TRUNK}embeddings.", f"{TRUNK}img_embeddings."
  regress, classify = "feat_regress.", "region_classifier."
  mrfr, mrc = "objectives_mrfr", "objectives_mrc"
  types = tuple(f"{tower}/type/embedding" for tower in (words, image))
  return [
    rules.Rule(
      (f"{embeddings}word_embeddings.weight", "cls.predictions.decoder.weight"),
      f"{words}/word/embedding",
      "V D -> V D",
    ),
    rules.Rule(
      f"{embeddings}position_embeddings.weight",
      f"{words}/position/embedding",
      "T D -> T D",
      fit=_refuse_length,
    ),
    # The first type is of words, the second one of regions.
    rules.Rule(f"{embeddings}token_type_embeddings.weight", types, "2 D -> 2 1 D"),
    *towers.norm_rules(f"{embeddings}LayerNorm.", f"{words}/norm", "D"),
    rules.Rule(
      (f"{regions}img_linear.weight", f"{regress}weight"),
      f"{image}/feature/kernel",
      "D Z -> Z D",
    ),
    rules.Rule(f"{regions}img_linear.bias", f"{image}/feature/bias", "D -> D"),
    *towers.norm_rules(f"{regions}img_layer_norm.", f"{image}/feature_norm", "D"),
    *towers.linear_rules(f"{regions}pos_linear.", f"{image}/place", "P", "D"),
    *towers.norm_rules(f"{regions}pos_layer_norm.", f"{image}/place_norm", "D"),
    rules.Rule(MASK, f"{image}/mask", "1 Z -> Z"),
    *towers.norm_rules(f"{regions}LayerNorm.", f"{image}/norm", "D"),
    *towers.bert_layer_rules(
      f"{TRUNK}encoder.layer.", f"{fusion}/blocks", range(layers)
    ),
    *towers.linear_rules(f"{TRUNK}pooler.dense.", f"{fusion}/pool/dense", "D", "D'"),
    *towers.bert_mlm_rules("cls.predictions.", "objectives_mlm", decoder_bias=False),
    *towers.linear_rules("itm_output.", "objectives_itm/head", "D", "2"),
    *_head(f"{regress}net.", mrfr),
    rules.Rule(f"{regress}bias", f"{mrfr}/bias", "Z -> Z"),
    *_head(f"{classify}net.", mrc),
    *towers.linear_rules(f"{classify}net.3.", f"{mrc}/decoder", "D", "C"),
  ]


def _head(theirs, ours):
  """Linear, GELU, norm."""
  return [
    rules.Rule(f"{theirs}0.weight", f"{ours}/dense/kernel", "D' D -> D D'"),
    rules.Rule(f"{theirs}0.bias", f"{ours}/dense/bias", "D -> D"),
    *towers.norm_rules(f"{theirs}2.", f"{ours}/norm", "D"),
  ]


def _refuse_length(table, shape):
  raise ValueError(f"say model.text.length={table.shape[0]} (not {shape[0]})")


def _read(path, key):
  """The tensors, by the newer names, the mask without its row of zeros."""
  tensors = {
    TRUNK + name.removeprefix(OLD) if name.startswith(OLD) else name: x
    for name, x in reader.load(path, key=key).items()
  }
  if MASK in tensors and tensors[MASK].shape[:1] == (2,):
    tensors[MASK] = tensors[MASK][1:]
  return tensors


LAYOUT = layout.Layout(
  words=layout.words("UNITER", "regions, words and one stream"),
  table=parameter_rules,
  stacks=dict(
    layers=layout.Stack(
      theirs=f"{TRUNK}encoder.layer.{{i}}.",
      query="model/fusion/blocks/attn/query/kernel",
      letter="N",
      norm=f"{TRUNK}embeddings.LayerNorm.weight",
    )
  ),
  paths=("model/image/feature/kernel",),
)
