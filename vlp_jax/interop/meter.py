"""Official METER checkpoints (zdou0830/METER, meter/modules/meter_module.py).

A CLIP ViT without its last layer, a RoBERTa or BERT, and co-attention, pretrained or
with the head of a downstream task. `vit_model.ln_final` and
`vit_model.positional_embedding` (of CLIP's text tower), and `text_transformer.pooler`
lie in the files and are never used: `Checkpoint.unused` keeps them, so that what is
written is what was read.
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
from vlp_jax.interop import vilt

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
TEXT, IMAGE = "text_transformer.", "vit_model.visual."
# clip_model.py; roberta-base or bert-base-uncased; bert_model.py.
MADE_WITH = made_with_lib.of(
  image=dict(act="quick_gelu", norm_eps=1e-5),
  text=made_with_lib.BERT | dict(norm_eps=frozenset({1e-5, 1e-12})),
  fusion=dict(act="gelu", norm_eps=1e-12),
)


Checkpoint = layout.Carrying


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
  params = LAYOUT.read(
    tensors,
    path,
    num_heads_image=num_heads_image,
    num_heads_text=num_heads_text,
    num_heads_fusion=num_heads_fusion,
  )
  return Checkpoint(params, LAYOUT.left(tensors))


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
  """Parameters of a model from an official file: `c.init = dict(type="meter", path=…)`.

  The table of image positions is resized to the model's grid as the official
  `adapt_position_encoding` does it (bicubic). What tasks begin with, arguments and
  errors are as of `vilt.init`.
  """
  made_with_lib.check(model, MADE_WITH, path, made_with)
  read = lambda: vilt.with_rank(reader.load(path, key=key), abstract_params)
  return LAYOUT.fit(read, path, abstract_params, skip=skip, fresh=fresh)


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


LAYOUT = layout.Layout(
  words=layout.words("METER", "a ViT, a text encoder and co-attention"),
  table=_rules,
  stacks=dict(
    depth_image=layout.Stack(
      theirs=f"{IMAGE}transformer.resblocks.{{i}}.",
      query="model/image/blocks/attn/query/kernel",
      letter="M",
      norm=f"{IMAGE}ln_post.weight",
      option="num_heads_image",
    ),
    depth_text=layout.Stack(
      theirs=f"{TEXT}encoder.layer.{{i}}.",
      query="model/text/blocks/attn/query/kernel",
      letter="N",
      norm=f"{TEXT}embeddings.LayerNorm.weight",
      option="num_heads_text",
    ),
    depth_fusion=layout.Stack(
      theirs="cross_modal_text_layers.{i}.",
      query="model/fusion/blocks/text/attn/query/kernel",
      letter="O",
      norm="cross_modal_text_transform.bias",
      option="num_heads_fusion",
    ),
  ),
  in_file=vilt.in_file,
  in_tree=vilt.in_tree,
  unused=UNUSED,
)
