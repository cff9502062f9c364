"""Official BEiT-3 checkpoints (microsoft/unilm, beit3) <-> our model of experts.

torchscale's BEiT3 under "beit3.", and the heads of pretraining (`mlm_head`, `mim_head`)
or of retrieval (`language_head`, `vision_head`, `logit_scale`). Images are their
modality A, texts B. The first two rows of their table of image positions stand for
nothing, as fairseq counts from 2: they are kept beside the model, "unused".
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
from vlp_jax.ops import tree as tree_lib

# Sizes: those of `towers`, of the width W, G mlp and M heads of both modalities; U rows
# that are not used, C codes, E of the contrastive space.

SIGNATURE = (
  r"beit3\.text_embed\.weight",
  r"beit3\.encoder\.layers\.0\.self_attn\.q_proj\.A\.weight",
)
MODALITIES = {"A": "image", "B": "text"}
POSITIONS = "beit3.encoder.embed_positions.A.weight"
UNUSED = "unused.positions"
ROWS = 2  # of them
BLOCKS = "model/fusion/lower/blocks"
# What a model has for its targets, and their files do not.
BESIDE = r"model/codebook/.*"
# torchscale architecture/config.py.
MADE_WITH = made_with_lib.of(fusion=dict(act="gelu", norm_eps=1e-5))


Checkpoint = layout.Checkpoint


def load(
  path: str | os.PathLike, *, num_heads: int | None = None, key: str | None = None
) -> Checkpoint:
  """Reads an official file.

  Args:
    path: see `reader.load`, also for `key` (the official files have "model").
    num_heads: which no shape tells; None: of 64 each, as in all that is published.

  Raises:
    FileNotFoundError, ValueError: see `reader.load` and `rules.from_theirs`.
  """
  tensors = reader.load(path, key=key)
  what = f"the BEiT-3 checkpoint {path}"
  norm = "beit3.encoder.layer_norm.A.weight"
  depth = towers.depth(tensors, "beit3.encoder.layers.{i}.", what)
  heads = towers.heads(tensors, norm, num_heads, "num_heads")
  table = _rules(depth, [h for h in HEADS if f"{h}.weight" in tensors], tensors)
  params = rules.from_theirs(_cut(tensors), table, sizes=dict(M=heads), what=what)
  return Checkpoint(params)


def save(
  path: str | os.PathLike, checkpoint: Checkpoint, *, key: str | None = None
) -> None:
  """Writes an official file; what `load` read comes back bit by bit.

  Args:
    path: .pth or .safetensors, see `reader.save`.
    checkpoint: parameters without boxes.
    key: the official files have "model"; not for .safetensors.
  """
  reader.save(path, export(checkpoint.params), key=key)


def export(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """A tree of the parameters (or of gradients) as {official name: tensor}.

  Rows that are not used are zero where the tree does not have them.
  """
  if "unused" not in params:
    table = params["model"]["image"]["posemb"]
    rows = np.zeros((ROWS, table.shape[1]), table.dtype)
    params = dict(params) | {"unused": {"positions": rows}}
  table, sizes = _table(params)
  tensors = rules.to_theirs(params, table, sizes=sizes)
  unused = tensors.pop(UNUSED)
  tensors[POSITIONS] = np.concatenate([unused, tensors[POSITIONS]])
  return tensors


def of_model(model: Any, params: Mapping[str, Any]) -> Checkpoint:
  """A trained model of BEiT-3's kind, without its codebook.

  Args:
    model: the VLM. params: its pretrainer's, arrays without boxes.

  Raises:
    ValueError: it has other layers; lists the fields.
  """
  made_with_lib.check(model, MADE_WITH, "a model of BEiT-3")
  leaves = tree_lib.flatten(params)
  kept = {k: x for k, x in leaves.items() if not rules.matches(k, (BESIDE,))}
  return Checkpoint(rules.nest(kept))


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
  """Parameters of a model: `c.init = dict(type="beit3", path=…, key="model")`.

  The table of positions is resized to the model's grid, as the official code does.

  Arguments and errors as of `vilt.init`; the codebook is not in the file, and another
  part of `c.init` fills it: fresh=["model/codebook/.*"].
  """
  made_with_lib.check(model, MADE_WITH, path, made_with)
  table, sizes = _table(abstract_params)
  return rules.from_theirs(
    _cut(reader.load(path, key=key)),
    table,
    sizes=sizes,
    shapes=abstract_params,
    skip=(UNUSED.replace(".", r"\."), *skip),
    fresh=fresh,
    what=f"the BEiT-3 checkpoint {path}, for this model,",
  )


HEADS = {
  "mlm_head": ("objectives_mdm/words/decoder/kernel", "objectives_mdm/words/bias", "V"),
  "mim_head": (
    "objectives_mdm/codebook/decoder/kernel",
    "objectives_mdm/codebook/decoder/bias",
    "C",
  ),
  "vision_head": ("model/image_proj/kernel", None, "E"),
  "language_head": ("model/text_proj/kernel", None, "E"),
}


def _cut(tensors):
  """The tensors, with the rows of positions that are not used by themselves."""
  if POSITIONS not in tensors:
    return tensors
  table = tensors[POSITIONS]
  return tensors | {POSITIONS: table[ROWS:], UNUSED: table[:ROWS]}


def _rules(depth, heads, names):
  """Rules of a model with some of HEADS, and the scale where `names` has it."""
  embed, encoder = "beit3.vision_embed.", "beit3.encoder."
  table = [
    rules.Rule("beit3.text_embed.weight", "model/text/word/embedding", "V W -> V W"),
    rules.Rule(
      f"{encoder}embed_positions.B.weight",
      "model/text/position/embedding",
      "T W -> T W",
    ),
    rules.Rule(f"{embed}cls_token", "model/image/cls", "1 1 W -> W"),
    rules.Rule(f"{embed}mask_token", "model/image/mask", "1 1 W -> W"),
    rules.Rule(
      f"{embed}proj.weight", "model/image/patch/kernel", "W c p q -> (p q c) W"
    ),
    rules.Rule(f"{embed}proj.bias", "model/image/patch/bias", "W -> W"),
    rules.Rule(POSITIONS, "model/image/posemb", "L W -> L W", fit=towers.resize_to(1)),
    rules.Rule(UNUSED, "unused/positions", "U W -> U W"),
  ]
  for theirs, ours in MODALITIES.items():
    norm = f"{encoder}layer_norm.{theirs}."
    table += towers.norm_rules(norm, f"model/fusion/norm_{ours}", "W")
    table += _layers(f"{encoder}layers.{{i}}.", theirs, ours, range(depth))
  for name in heads:
    kernel, bias, size = HEADS[name]
    axes = f"{size} W -> W {size}"
    table.append(rules.Rule(f"{name}.weight", kernel, axes))
    if bias:
      table.append(rules.Rule(f"{name}.bias", bias, f"{size} -> {size}"))
  if "logit_scale" in names:
    table.append(rules.Rule("logit_scale", "model/log_scale", "->"))
  return table


def _layers(prefix, theirs, ours, layers):
  """One modality's part of all layers."""
  attention, table = f"{prefix}self_attn.", []
  for name, our_name in dict(q="query", k="key", v="value").items():
    path = f"{BLOCKS}/attn/{our_name}_{ours}"
    weight, bias = f"{attention}{name}_proj.{theirs}.", "(M h) -> M h"
    table += [
      rules.Rule(f"{weight}weight", f"{path}/kernel", "(M h) W -> W M h", layers),
      rules.Rule(f"{weight}bias", f"{path}/bias", bias, layers),
    ]
  out, path = f"{attention}out_proj.{theirs}.", f"{BLOCKS}/attn/out_{ours}"
  table += [
    rules.Rule(f"{out}weight", f"{path}/kernel", "W (M h) -> M h W", layers),
    rules.Rule(f"{out}bias", f"{path}/bias", "W -> W", layers),
  ]
  mlp, path = f"{prefix}ffn.{theirs}.", f"{BLOCKS}/mlp_{ours}"
  inner = f"{attention}inner_attn_ln.{theirs}."
  return [
    *table,
    *towers.norm_rules(inner, f"{BLOCKS}/attn/norm_inner_{ours}", "W", layers),
    *towers.norm_rules(
      f"{prefix}self_attn_layer_norm.{theirs}.",
      f"{BLOCKS}/norm_attn_{ours}",
      "W",
      layers,
    ),
    *towers.norm_rules(
      f"{prefix}final_layer_norm.{theirs}.", f"{BLOCKS}/norm_mlp_{ours}", "W", layers
    ),
    *towers.linear_rules(f"{mlp}fc1.", f"{path}/up", "W", "G", layers),
    *towers.norm_rules(f"{mlp}ffn_layernorm.", f"{path}/norm", "G", layers),
    *towers.linear_rules(f"{mlp}fc2.", f"{path}/down", "G", "W", layers),
  ]


def _table(params):
  """(table, sizes) of a tree of ours."""
  leaves = tree_lib.flatten(params)
  refusal = (
    "this model is not of BEiT-3's kind (one stack, experts and attention of each"
    " modality's own)"
  )
  wanted = [f"{BLOCKS}/attn/query_image/kernel", layout.PATCH]
  query, patch = layout.shapes(params, wanted, refusal).values()
  named = [name for name, (kernel, _, _) in HEADS.items() if kernel in leaves]
  names = ["logit_scale"] if "model/log_scale" in leaves else []
  table = _rules(query[0], named, names)
  if "unused" not in params:
    table = [rule for rule in table if rule.theirs != UNUSED]
  return table, dict(M=query[2], **layout.sides(patch))
