"""Official files of BEiT v2's tokenizer (VQ-KD) <-> our `models/codebooks/vqkd.py`.

microsoft/unilm, beit2/modeling_vqkd.py; beit2/TOKENIZER.md names three of them. What
only its training has, the decoder, the teacher, and how often a code was used, lies in
`Checkpoint.unused`.
"""

from collections.abc import Mapping, Sequence
import os
import pathlib
from typing import Any

import numpy as np

from vlp_jax.interop import layout
from vlp_jax.interop import reader
from vlp_jax.interop import rules
from vlp_jax.interop import towers
from vlp_jax.ops import tree as tree_lib

# Sizes: those of `towers`, T width of the layer before the codes, K of a code, C codes.

SIGNATURE = (
  r"encoder\.blocks\.0\.attn\.qkv\.weight",
  r"encode_task_layer\.0\.weight",
  r"quantize\.embedding\.weight",
)
UNUSED = (
  r"decoder\..*",
  r"decode_task_layer\..*",
  r"quantize\.cluster_size",
  r"quantize\.embedding\.(cluster_size|embed_avg|initted)",
  # Of training; the official code passes over them by these beginnings.
  r"(loss|teacher|scaling).*",
)
OURS = "model/codebook"
RELEASE = "https://github.com/addf400/files/releases/download/BEiT-v2/"
FILES = (
  "vqkd_encoder_base_decoder_1x768x12_clip-d93179da.pth",
  "vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth",
  "vqkd_encoder_base_decoder_1x768x12_dino-663c55d7.pth",
)


Checkpoint = layout.Carrying


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
  tensors = _read(path, key)
  depth = towers.depth(tensors, "encoder.blocks.{i}.", f"{path} is no VQ-KD tokenizer")
  heads = towers.heads(tensors, "encoder.fc_norm.weight", num_heads, "num_heads")
  params = rules.from_theirs(
    tensors,
    _rules(depth),
    sizes=dict(M=heads),
    skip=UNUSED,
    what=f"the VQ-KD tokenizer {path}",
  )
  left = {name: x for name, x in tensors.items() if rules.matches(name, UNUSED)}
  return Checkpoint(params, left)


def save(
  path: str | os.PathLike, checkpoint: Checkpoint, *, key: str | None = None
) -> None:
  """Writes an official file; what `load` read comes back bit by bit.

  Args:
    path: .pth or .safetensors, see `reader.save`.
    checkpoint: parameters without boxes. Without `unused` the file lacks the decoder,
      for which the official code has to be told strict=False.
    key: the official files have "model"; not for .safetensors.
  """
  reader.save(path, export(checkpoint.params) | checkpoint.unused, key=key)


def export(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """A tree of the parameters' shape as {official name: tensor}."""
  depth, sizes = _of_tree(params)
  return rules.to_theirs(params, _rules(depth), sizes=sizes)


def init(
  abstract_params: Mapping[str, Any],
  *,
  path: str | os.PathLike,
  key: str | None = None,
  fresh: Sequence[str] = (),
) -> dict[str, Any]:
  """`c.init.codebook = dict(type="vqkd", path="vqkd_encoder_base_….pth")`.

  The table of positions is resized to the model's grid as the official code does it.

  Args:
    abstract_params: the run's tree; leaves have shape and dtype.
    path, key: see `reader.load`.
    fresh: of whole paths of the codebook that the file does not have.

  Raises:
    FileNotFoundError: there is no such file; says where a published one is.
    ValueError: one error that lists all that does not fit.
  """
  depth, sizes = _of_tree(abstract_params)
  return rules.fill(
    abstract_params,
    [OURS],
    _read(path, key),
    _rules(depth),
    sizes=sizes,
    skip=UNUSED,
    fresh=fresh,
    what=f"the VQ-KD tokenizer {path}, for this model,",
  )


def _read(path, key):
  file = pathlib.Path(path)
  if file.name in FILES and not file.exists():
    raise FileNotFoundError(
      f"no checkpoint file {path}: it is {RELEASE}{file.name}; put it there, or say its"
      " place in --config.init.codebook.path=…; --config.init=None starts from nothing,"
      " with codes that mean nothing."
    )
  return reader.load(path, key=key)


def _of_tree(params):
  """(depth, sizes) of a tree of ours."""
  leaves = tree_lib.flatten(params)
  query = leaves.get(f"{OURS}/encoder/blocks/attn/query/kernel")
  patch = leaves.get(f"{OURS}/encoder/patch/kernel")
  if query is None or patch is None:
    raise ValueError(
      "the model has no VQ-KD tokenizer as its codebook: say"
      " model.codebook=dict(type='vqkd')."
    )
  depth, _, heads, _ = query.shape
  return depth, dict(M=heads, **layout.sides(patch.shape))


def _rules(depth):
  theirs, ours = "encoder.", f"{OURS}/encoder"
  fit = towers.resize_to(1, how="scaled")
  return [
    *towers.vit_embedding_rules(theirs, ours, fit),
    *towers.vit_block_rules(theirs, ours, depth, beit=True),
    *towers.linear_rules("encode_task_layer.0.", f"{OURS}/dense", "W", "T"),
    *towers.linear_rules("encode_task_layer.2.", f"{OURS}/out", "T", "K"),
    rules.Rule("quantize.embedding.weight", f"{OURS}/table", "C K -> C K"),
  ]
