"""Official METER checkpoints (zdou0830/METER, meter/modules/meter_module.py).

A CLIP ViT without its last layer, a RoBERTa or BERT, and co-attention, pretrained or
with the head of a downstream task. `vit_model.ln_final` and
`vit_model.positional_embedding` (of CLIP's text tower), and `text_transformer.pooler`
lie in the files and are never used: `Checkpoint.unused` keeps them, so that what is
written is what was read.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import os
import re
from typing import Any

import numpy as np

from vlp_jax.interop import made_with as made_with_lib
from vlp_jax.interop import reader
from vlp_jax.interop import rules
from vlp_jax.interop import towers
from vlp_jax.interop import vilt
from vlp_jax.ops import tree as tree_lib

# Sizes: those of `towers`, D F N H T K V being the text encoder's, and of the fusion
# X width, Y mlp, O heads, I head_dim, R types; P of a pooled pair.
FUSION = {"D": "X", "F": "Y", "N": "O", "H": "I"}

# A checkpoint of this format has tensors of these names.
SIGNATURE = (
  r"vit_model\.visual\..*",
  r"text_transformer\..*",
  r"cross_modal_(text|image)_layers\..*",
)
UNUSED = (
  r"vit_model\.(positional_embedding|ln_final\..*)",
  r"text_transformer\.pooler\..*",
)
HEADS = vilt.HEADS
TEXT, IMAGE = "text_transformer.", "vit_model.visual."
# clip_model.py; roberta-base or bert-base-uncased; bert_model.py.
MADE_WITH = made_with_lib.of(
  image=dict(act="quick_gelu", norm_eps=1e-5),
  text=made_with_lib.BERT | dict(norm_eps=frozenset({1e-5, 1e-12})),
  fusion=dict(act="gelu", norm_eps=1e-12),
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What an official file holds.

  params: tree of ours. unused: {name: tensor} that the official model carries along.
  """

  params: dict[str, Any]
  unused: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def load(
  path: str | os.PathLike,
  *,
  num_heads_image: int | None = None,
  num_heads_text: int | None = None,
  num_heads_fusion: int | None = None,
  key: str | None = None,
) -> Checkpoint:
  """Reads an official file, of pretraining or of a task.

  Args:
    path: see `reader.load`, also for `key`.
    num_heads_image, num_heads_text, num_heads_fusion: which no shape tells; None: of 64
      each, as in all that is published.

  Raises:
    FileNotFoundError, ValueError: see `reader.load` and `rules.from_theirs`.
  """
  tensors = reader.load(path, key=key)
  sizes = dict(
    M=towers.heads(
      tensors, f"{IMAGE}ln_post.weight", num_heads_image, "num_heads_image"
    ),
    N=towers.heads(
      tensors, f"{TEXT}embeddings.LayerNorm.weight", num_heads_text, "num_heads_text"
    ),
    O=towers.heads(
      tensors, "cross_modal_text_transform.bias", num_heads_fusion, "num_heads_fusion"
    ),
  )
  params = rules.from_theirs(
    tensors,
    parameter_rules(tensors, f"{path} is no METER checkpoint"),
    sizes=sizes,
    skip=UNUSED,
    what=f"the METER checkpoint {path}",
  )
  is_unused = lambda name: any(re.fullmatch(pattern, name) for pattern in UNUSED)
  return Checkpoint(params, {k: x for k, x in tensors.items() if is_unused(k)})


def save(
  path: str | os.PathLike, checkpoint: Checkpoint, *, key: str | None = None
) -> None:
  """Writes an official file; what `load` read comes back bit by bit.

  Args:
    path: .ckpt, .pth or .safetensors, see `reader.save`.
    checkpoint: parameters without boxes. Without `unused` the file lacks tensors that
      the official code loads past (strict=False).
    key: the official files have "state_dict"; not for .safetensors.
  """
  reader.save(path, export(checkpoint.params) | checkpoint.unused, key=key)


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
  """Parameters of a model from an official file: `c.init = dict(type="meter", path=…)`.

  The table of image positions is resized to the model's grid as the official
  `adapt_position_encoding` does it (bicubic). What tasks begin with is as of
  `vilt.init`.

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
  table, sizes = _table(abstract_params)
  return rules.from_theirs(
    vilt.with_rank(reader.load(path, key=key), abstract_params),
    table,
    sizes=sizes,
    shapes=abstract_params,
    skip=(*UNUSED, *skip),
    fresh=fresh,
    what=f"the METER checkpoint {path}, for this model,",
  )


def parameter_rules(tensors: Mapping[str, Any], what: str) -> rules.Table:
  """The table for a file of these tensors; `what` says which file it is not."""
  depth = lambda layer: towers.depth(tensors, layer, what)
  return _rules(
    depth_image=depth(f"{IMAGE}transformer.resblocks.{{i}}."),
    depth_text=depth(f"{TEXT}encoder.layer.{{i}}."),
    depth_fusion=depth("cross_modal_text_layers.{i}."),
    heads=[name for name, theirs in HEADS.items() if f"{theirs}weight" in tensors],
  )


def _rules(*, depth_image, depth_text, depth_fusion, heads):
  model, fusion = "model", "model/fusion"
  layers = range(depth_fusion)
  table = [
    *towers.clip_vit_rules(IMAGE, f"{model}/image", depth_image),
    *towers.bert_embedding_rules(f"{TEXT}embeddings.", f"{model}/text"),
    rules.Rule(
      f"{TEXT}embeddings.word_embeddings.weight",
      f"{model}/text/word/embedding",
      "V D -> V D",
    ),
    *towers.bert_layer_rules(
      f"{TEXT}encoder.layer.", f"{model}/text/blocks", range(depth_text)
    ),
    *towers.linear_rules(
      "cross_modal_text_transform.", f"{fusion}/text_proj", "D", "X"
    ),
    *towers.linear_rules(
      "cross_modal_image_transform.", f"{fusion}/image_proj", "W", "X"
    ),
    rules.Rule(
      "token_type_embeddings.weight",
      f"{fusion}/type/embedding",
      "R X -> R X",
      fit=vilt.second_image,
    ),
  ]
  for name in ("text", "image"):
    theirs, ours = f"cross_modal_{name}_layers.", f"{fusion}/blocks/{name}"
    both = towers.bert_layer_rules(theirs, ours, layers, cross=True, memory="D'")
    table += rules.relabel(both, FUSION)
    theirs, ours = f"cross_modal_{name}_pooler.dense.", f"{fusion}/{name}_pool/dense"
    table += towers.linear_rules(theirs, ours, "X", "X'")
  return [*table, *(rule for head in heads for rule in vilt.head_rules(head, "X"))]


def _table(params):
  """(table, sizes) of a tree of ours."""
  leaves = tree_lib.flatten(params)
  attention = dict(
    M="model/image/blocks/attn/query/kernel",
    N="model/text/blocks/attn/query/kernel",
    O="model/fusion/blocks/text/attn/query/kernel",
  )
  wanted = [*attention.values(), "model/image/patch/kernel"]
  missing = [path for path in wanted if path not in leaves]
  if missing:
    raise ValueError(
      "this model is not of METER's kind (a ViT, a text encoder and co-attention):"
      f" it has no {', '.join(missing)}."
    )
  shapes = {letter: leaves[path].shape for letter, path in attention.items()}
  side = round((leaves["model/image/patch/kernel"].shape[0] / 3) ** 0.5)
  table = _rules(
    depth_image=shapes["M"][0],
    depth_text=shapes["N"][0],
    depth_fusion=shapes["O"][0],
    heads=[name for name in HEADS if f"objectives_{name}" in params],
  )
  return table, dict({c: shape[2] for c, shape in shapes.items()}, p=side, q=side)
