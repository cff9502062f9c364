"""FlavaImageCodebook of Hugging Face's transformers <-> our `models/codebooks/dvae.py`.

The same network as the encoder of openai/DALL-E. Its own file, encoder.pkl, is a
pickled module, that is, code: it is refused. Its tensors may be read, by its own names.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import os
import pathlib
from typing import Any

from vlp_jax.interop import hf
from vlp_jax.interop import reader
from vlp_jax.interop import rules
from vlp_jax.models.codebooks import dvae
from vlp_jax.ops import tree as tree_lib

# Sizes: H channels of the input's map, O1 … O4 of the groups, N1 … within their blocks,
# C codes, c channels of a pixel; r s and p q sides of kernels.

SIGNATURE = (
  r"blocks\.input\.(weight|w)",
  r"blocks\.output\.conv\.(weight|w)",
  r"blocks\.group_1\.(group\.)?block_1\..*",
)
OURS = "model/codebook"
HUB = "facebook/flava-image-codebook"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """params: {"model": {"codebook": …}}. config: of config.json; None: of a file."""

  params: dict[str, Any]
  config: dict[str, Any] | None = None


def load(path: str | os.PathLike, *, key: str | None = None) -> Checkpoint:
  """Reads a directory, a name of the hub, or a file of the tensors of encoder.pkl.

  Raises:
    FileNotFoundError, ValueError: see `hf.read`, `reader.load`, `rules.from_theirs`.
  """
  tensors, config, what = _read(path, key)
  table = _rules(_blocks(tensors), "group." if _is_hf(tensors) else "")
  return Checkpoint(rules.from_theirs(tensors, table, what=what), config)


def save(path: str | os.PathLike, checkpoint: Checkpoint) -> None:
  """Writes a directory, as `FlavaImageCodebook.from_pretrained` reads it."""
  params = checkpoint.params
  leaves = tree_lib.flatten(params)
  config = checkpoint.config or dict(
    model_type="flava_image_codebook",
    architectures=["FlavaImageCodebook"],
    num_groups=dvae.GROUPS,
    input_channels=3,
    num_blocks_per_group=_our_blocks(leaves),
    hidden_size=leaves[f"{OURS}/input/bias"].shape[0],
    vocab_size=leaves[f"{OURS}/output/bias"].shape[0],
    freeze=True,
  )
  hf.write(path, config, export(params))


def export(params: Mapping[str, Any]) -> dict[str, Any]:
  """A tree of ours as {their name: tensor}."""
  table = _rules(_our_blocks(tree_lib.flatten(params)), "group.")
  return rules.to_theirs(params, table)


def init(
  abstract_params: Mapping[str, Any],
  *,
  path: str | os.PathLike,
  key: str | None = None,
  fresh: Sequence[str] = (),
) -> dict[str, Any]:
  """`c.init.codebook = dict(type="hf_codebook", path="facebook/flava-image-codebook")`.

  Args:
    abstract_params: the run's tree; leaves have shape and dtype.
    path, key: as of `load`.
    fresh: of whole paths of the codebook that the file does not have.

  Raises:
    FileNotFoundError, ValueError: one error that lists all that does not fit.
  """
  tensors, _, what = _read(path, key)
  blocks = _our_blocks(tree_lib.flatten(abstract_params))
  return rules.fill(
    abstract_params,
    [OURS],
    tensors,
    _rules(blocks, "group." if _is_hf(tensors) else ""),
    fresh=fresh,
    what=f"{what}, for this model,",
  )


def _read(path, key):
  """(tensors, config or None, what they are of)."""
  if pathlib.Path(path).is_file():
    if pathlib.Path(path).suffix == ".pkl":
      raise ValueError(
        f"{path} is a pickled module of openai/DALL-E, that is, code, and nothing is"
        f" unpickled here. The same weights are {HUB} of Hugging Face's hub: say"
        f' path="{HUB}", or the directory of it.'
      )
    return reader.load(path, key=key), None, f"the codebook {path}"
  directory = hf.read(path)
  what = f"the directory {directory.path}"
  kind = directory.config.get("model_type")
  if kind != "flava_image_codebook":
    raise ValueError(f"{what}: model_type={kind!r}: want 'flava_image_codebook'.")
  wanted = dict(num_groups=dvae.GROUPS, input_channels=3)
  hf.require(directory.config, wanted, what)
  return directory.tensors, directory.config, what


def _is_hf(tensors):
  return "blocks.input.weight" in tensors


def _blocks(tensors):
  """Blocks of a group."""
  inner = "group." if _is_hf(tensors) else ""
  before = f"blocks.group_1.{inner}block_"
  return max(
    (int(n[len(before) :].split(".")[0]) for n in tensors if n.startswith(before)),
    default=0,
  )


def _our_blocks(leaves):
  before = f"{OURS}/group_1_block_"
  found = {path[len(before) :].split("/")[0] for path in leaves if before in path}
  if not found:
    raise ValueError(
      "the model has no dVAE as its codebook: say model.codebook=dict(type='dvae')."
    )
  return len(found)


def _rules(blocks, inner):
  """inner: "group." of transformers, which has a module more; "" of openai."""
  table = [
    *_conv("blocks.input", "input", "r s c H", inner),
    *_conv("blocks.output.conv", "output", "1 1 O4 C", inner),
  ]
  width = "H"
  for group in range(1, dvae.GROUPS + 1):
    for number in range(1, blocks + 1):
      theirs = f"blocks.group_{group}.{inner}block_{number}."
      path = f"{theirs}res_path.{'path.' if inner else ''}conv_"
      ours = f"group_{group}_block_{number}"
      out, narrow = f"O{group}", f"N{group}"
      into = width if number == 1 else out
      sides = [
        (into, narrow, "p q"),
        (narrow, f"{narrow}'", "p q"),
        (narrow, f"{narrow}'", "p q"),
      ]
      for i, (a, b, size) in enumerate([*sides, (narrow, out, "1 1")], 1):
        axes = f"{size} {a} {b}"
        table += _conv(f"{path}{i}", f"{ours}/conv_{i}", axes, inner)
      if number == 1 and group > 1:
        table += _conv(f"{theirs}id_path", f"{ours}/id", f"1 1 {into} {out}", inner)
    width = f"O{group}"
  return table


def _conv(theirs, ours, axes, inner):
  """A convolution, of which torch's weight is [out, in, rows, columns]."""
  rows, columns, into, out = axes.split()
  weight, bias = ("weight", "bias") if inner else ("w", "b")
  left = f"{out} {into} {rows} {columns}"
  return [
    rules.Rule(f"{theirs}.{weight}", f"{OURS}/{ours}/kernel", f"{left} -> {axes}"),
    rules.Rule(f"{theirs}.{bias}", f"{OURS}/{ours}/bias", f"{out} -> {out}"),
  ]
