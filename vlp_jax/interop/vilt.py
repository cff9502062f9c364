"""Official ViLT checkpoints (dandelin/ViLT, vilt/modules/vilt_module.py).

One stream over words and patches, pretrained or with the head of a downstream task.
Words and patches are the two encoders of ours, the ViT's blocks the fusion.
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

# Sizes: those of `towers`, with the width W of all, R types, P of the pooled pair.

# A checkpoint of this format has tensors of these names.
SIGNATURE = (
  r"text_embeddings\..*",
  r"token_type_embeddings\.weight",
  r"transformer\.blocks\..*",
  r"!transformer\.blocks\.0\.mlp_text\..*",  # VLMo
)
# Our objectives, and the layer whose weight tells whether the file has them.
HEADS = {
  "itm": "itm_score.fc.",
  "mlm": "mlm_score.decoder.",
  "vqa_scores": "vqa_classifier.0.",
  "pair_classify": "nlvr2_classifier.0.",
  "text_rank": "rank_output.",
}
# vision_transformer.py; BertEmbeddings with the defaults of its config.
MADE_WITH = made_with_lib.of(
  text=dict(norm_eps=1e-12), fusion=made_with_lib.TIMM | dict(norm="pre")
)


Checkpoint = layout.Checkpoint


def load(
  path: str | os.PathLike, *, num_heads: int | None = None, key: str | None = None
) -> Checkpoint:
  """Reads an official file, of pretraining or of a task.

  Args:
    path: see `reader.load`, also for `key`.
    num_heads: which no shape tells; None: of 64 each, as in all that is published.

  Raises:
    FileNotFoundError, ValueError: see `reader.load` and `rules.from_theirs`.
  """
  tensors = reader.load(path, key=key)
  return Checkpoint(LAYOUT.read(tensors, path, num_heads=num_heads))


def save(
  path: str | os.PathLike, checkpoint: Checkpoint, *, key: str | None = None
) -> None:
  """Writes an official file; what `load` read comes back bit by bit.

  Args:
    path: .ckpt, .pth or .safetensors, see `reader.save`.
    checkpoint: parameters without boxes.
    key: the official files have "state_dict"; not for .safetensors.
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
  """Parameters of a model from an official file: `c.init = dict(type="vilt", path=…)`.

  As the official code does it, the type of a second image (NLVR2) begins as that of the
  first, and the head of `text_rank` as the matching head's row of "match".

  Args:
    abstract_params: the model's tree, without boxes; leaves have shape and dtype.
    path, key: see `reader.load`.
    skip: regular expressions of whole names in the file that the model does not use,
      e.g. `(mlm|itm)_score\\..*` for a downstream task.
    fresh: of whole paths of the model that the file does not have.
    model, made_with: see `made_with.check`; None: not compared.

  Raises:
    FileNotFoundError, ValueError: one error that lists all that does not fit.
  """
  made_with_lib.check(model, MADE_WITH, path, made_with)
  read = lambda: with_rank(reader.load(path, key=key), abstract_params)
  return LAYOUT.fit(read, path, abstract_params, skip=skip, fresh=fresh)


def _rules(depth, heads):
  image, words, fusion = "model/image", "model/text", "model/fusion"
  return [
    *towers.vit_embedding_rules("transformer.", image, fit=_refuse_grid),
    *towers.vit_block_rules("transformer.", fusion, depth),
    *_of_width(towers.bert_embedding_rules("text_embeddings.", words)),
    rules.Rule(
      "text_embeddings.word_embeddings.weight", f"{words}/word/embedding", "V W -> V W"
    ),
    rules.Rule(
      "token_type_embeddings.weight",
      f"{fusion}/type/embedding",
      "R W -> R W",
      fit=second_image,
    ),
    *towers.linear_rules("pooler.dense.", f"{fusion}/pool/dense", "W", "W'"),
    *(rule for head in heads for rule in head_rules(head, "W")),
  ]


def in_file(tensors: Mapping[str, Any]) -> dict[str, Any]:
  """Which of `HEADS` a file has; METER's have the same names."""
  return dict(heads=[k for k, theirs in HEADS.items() if f"{theirs}weight" in tensors])


def in_tree(params: Mapping[str, Any]) -> dict[str, Any]:
  """Which of `HEADS` a tree of ours has."""
  return dict(heads=[name for name in HEADS if f"objectives_{name}" in params])


def head_rules(head: str, width: str) -> rules.Table:
  """The head of one objective; `width` is the letter of its tokens' width.

  METER's heads have the same names.
  """
  ours, theirs = f"objectives_{head}", HEADS[head]
  if head == "mlm":
    mlm = towers.bert_mlm_rules("mlm_score.", ours, decoder_bias=False)
    decoder = f"V {width} -> {width} V"
    return [
      *rules.relabel(mlm, {"D": width}),
      rules.Rule("mlm_score.decoder.weight", f"{ours}/decoder/kernel", decoder),
    ]
  if head in ("itm", "text_rank"):
    return towers.linear_rules(
      theirs, f"{ours}/head", "P", "2" if head == "itm" else "1"
    )
  return towers.classifier_rules(theirs.removesuffix("0."), f"{ours}/head")


def with_rank(
  tensors: Mapping[str, np.ndarray], params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """The tensors, and a `rank_output` of the matching head's where `params` wants one.

  vilt_module.py and meter_module.py `__init__`.
  """
  rank, match = HEADS["text_rank"], HEADS["itm"]
  wanted = "objectives_text_rank" in params and f"{rank}weight" not in tensors
  if not wanted or f"{match}weight" not in tensors:
    return dict(tensors)
  leaves = ("weight", "bias")
  return tensors | {f"{rank}{leaf}": tensors[f"{match}{leaf}"][1:] for leaf in leaves}


def second_image(types: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """A table of two types as one of three, for `rules.Rule.fit`."""
  if types.shape[0] == 2 and shape[0] == 3:
    return np.concatenate([types, types[1:]])
  return types


def _refuse_grid(table, shape):
  # The model stretches the table to each image: resized, it would be another one.
  grid = round((table.shape[0] - 1) ** 0.5)
  raise ValueError(f"say model.image.table_res={grid} times model.image.patch")


def _of_width(table):
  return rules.relabel(table, {"D": "W"})


LAYOUT = layout.Layout(
  words=layout.words("ViLT", "patches, words and one merged stack"),
  table=_rules,
  stacks=dict(
    depth=layout.Stack(
      theirs="transformer.blocks.{i}.",
      query="model/fusion/blocks/attn/query/kernel",
      letter="M",
      norm="transformer.norm.weight",
    )
  ),
  in_file=in_file,
  in_tree=in_tree,
)
