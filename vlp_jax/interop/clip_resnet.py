"""CLIP with a residual network, as OpenAI and open_clip name its tensors.

clip/model.py ModifiedResNet; the text tower is that of `clip.py`. Running statistics
of batch norm go to the train state's memory.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import os
import re
from typing import Any

import numpy as np

from vlp_jax.interop import clip
from vlp_jax.interop import made_with
from vlp_jax.interop import reader
from vlp_jax.interop import rules
from vlp_jax.interop import towers
from vlp_jax.ops import tree as tree_lib

# Sizes: those of `towers` for the text; of the image s S the stem's, c1 … c4 channels
# within and e1 … e4 behind the blocks of a stage, M heads of h, L places, E embedding.

SIGNATURE = (
  r"visual\.attnpool\.q_proj\.weight",
  r"visual\.layer4\.0\.conv1\.weight",
  r"transformer\.resblocks\.0\.attn\.in_proj_weight",
  r"text_projection",
)
# What clip/model.py `convert_weights` halves here.
HALVED = re.compile(
  r"visual\.(.*\.)?(conv\d|downsample\.0)\.weight"
  r"|visual\.attnpool\.[qkvc]_proj\.(weight|bias)"
  rf"|{clip.HALVED.pattern}"
)
SHRINKS = 32  # pixels of a side to one place of the last map
STAGES = (1, 2, 3, 4)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What a file holds: params, and memory, the running statistics of batch norm."""

  params: dict[str, Any]
  memory: dict[str, Any]


def load(
  path: str | os.PathLike,
  *,
  num_heads_image: int | None = None,
  num_heads_text: int | None = None,
  key: str | None = None,
) -> Checkpoint:
  """Reads an official file (RN50.pt), or open_clip's.

  Args:
    path: see `reader.load`, also for `key`.
    num_heads_image, num_heads_text: of the attention that pools, and of the text; None:
      heads are 64 wide, as all of OpenAI's are.

  Returns:
    Trees of the file's types, so that `save` gives the same bits.

  Raises:
    FileNotFoundError, ValueError: see `reader.load` and `rules.from_theirs`.
  """
  tensors = reader.load(path, key=key)
  openai = clip.OPENAI in tensors
  bias = "visual.attnpool.q_proj.bias"
  sizes = dict(
    M=towers.heads(tensors, bias, num_heads_image, "num_heads_image"),
    N=towers.heads(tensors, "ln_final.weight", num_heads_text, "num_heads_text"),
  )
  tree = rules.from_theirs(
    tensors,
    checkpoint_rules(*_depths(tensors, path), openai=openai),
    sizes=sizes,
    what=f"{path}, as {_what(openai)},",
  )
  return Checkpoint(tree["params"], tree["memory"])


def save(
  path: str | os.PathLike,
  checkpoint: Checkpoint,
  *,
  openai: bool = False,
  key: str | None = None,
) -> None:
  """Writes a file that open_clip, and with `openai` clip's `build_model`, reads.

  Args:
    path: .pt or .safetensors, see `reader.save`, also for `key`.
    checkpoint: trees of arrays, without boxes.
    openai: with the three numbers, and weights in 16 bits, as OpenAI's files are.
  """
  tree = dict(params=checkpoint.params, memory=checkpoint.memory)
  blocks, depth, sizes = _sizes(checkpoint.params)
  table = checkpoint_rules(blocks, depth, openai=openai)
  what = f"the model, as {_what(openai)},"
  tensors = rules.to_theirs(tree, table, sizes=sizes, what=what)
  if openai:
    tensors = {
      name: x.astype(np.float16) if HALVED.fullmatch(name) else x
      for name, x in tensors.items()
    }
  reader.save(path, tensors, key=key)


def export(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """A tree of the parameters' shape (gradients) under official names."""
  blocks, depth, sizes = _sizes(params)
  table = _strip(checkpoint_rules(blocks, depth, openai=False), "params")
  return rules.to_theirs(params, table, sizes=sizes)


def init(
  abstract_params: Mapping[str, Any],
  *,
  path: str | os.PathLike,
  key: str | None = None,
  skip: Sequence[str] = (),
  fresh: Sequence[str] = (),
  model: Any = None,
) -> dict[str, Any]:
  """Parameters of a model: `c.init = dict(type="clip_resnet", path=…)`.

  The table of places is resized to the model's; see `clip.init` for the arguments and
  errors. The running statistics are `memory`'s.
  """
  tensors = reader.load(path, key=key)
  openai = clip.OPENAI in tensors
  made = {f"model.{tower}.norm_eps": clip.NORM_EPS for tower in ("image", "text")}
  if openai:
    made["model.text.act"] = "quick_gelu"
  made_with.check(model, made, path)
  return _fit(tensors, abstract_params, "params", path, skip=skip, fresh=fresh)


def memory(
  abstract_memory: Mapping[str, Any],
  *,
  path: str | os.PathLike,
  key: str | None = None,
  **more: Any,
) -> dict[str, Any]:
  """Running statistics of a model's memory; other leaves stay as they are.

  Args:
    abstract_memory: of the train state, without boxes; leaves have shape and dtype.
    path, key: as of `init`, whose other arguments say nothing here.
  """
  del more
  tensors = reader.load(path, key=key)
  return _fit(tensors, abstract_memory, "memory", path, fresh=(r"(?!model/).*",))


def checkpoint_rules(blocks: Sequence[int], depth: int, *, openai: bool) -> rules.Table:
  """The state dict <-> {"params": {"model": …}, "memory": {"model": …}}.

  blocks: of the four stages. depth: of the text tower.
  """
  model = "params/model"
  table = [
    *resnet_rules("visual.", "model/image", blocks),
    *towers.clip_text_rules("", f"{model}/text", depth),
    rules.Rule("text_projection", f"{model}/text_proj/kernel", "D E -> D E"),
    rules.Rule("logit_scale", f"{model}/log_scale", "->"),
  ]
  if openai:
    side = lambda sizes: math.isqrt(sizes["L"] - 1) * SHRINKS
    table += [
      rules.Constant(clip.OPENAI, lambda sizes: np.int64(side(sizes))),
      rules.Constant("context_length", lambda sizes: np.int64(sizes["T"])),
      rules.Constant("vocab_size", lambda sizes: np.int64(sizes["V"])),
    ]
  return table


def resnet_rules(theirs: str, ours: str, blocks: Sequence[int]) -> rules.Table:
  """A ModifiedResNet; `ours` is below "params" and "memory"."""
  stem = (("3", "s"), ("s", "s"), ("s", "c1"))
  table = []
  for i, (into, out) in enumerate(stem):
    names = (f"{theirs}conv{i + 1}.", f"{theirs}bn{i + 1}.")
    table += _unit(*names, f"{ours}/stem_{i}", f"{into} {out} 3")
  before = "c1"
  for i, count in zip(STAGES, blocks, strict=True):
    narrow, wide = f"c{i}", f"e{i}"
    first = f"{theirs}layer{i}.0.", f"{ours}/stage_{i - 1}/first"
    table += _bottleneck(*first, before, narrow, wide)
    skip = f"{first[0]}downsample."
    names = (f"{skip}0.", f"{skip}1.")
    table += _unit(*names, f"{first[1]}/skip", f"{before} {wide} 1")
    if count > 1:
      rest = f"{theirs}layer{i}.{{i+1}}.", f"{ours}/stage_{i - 1}/rest"
      table += _bottleneck(*rest, wide, narrow, wide, range(count - 1))
    before = wide
  return [*table, *_attention_rules(f"{theirs}attnpool.", f"params/{ours}")]


def _bottleneck(theirs, ours, before, narrow, wide, layers=None):
  sizes = (
    f"{before} {narrow} 1",
    f"{narrow} {narrow} 3",
    f"{narrow} {wide} 1",
  )
  table = []
  for i, (name, size) in enumerate(
    zip(("narrow", "look", "widen"), sizes, strict=True)
  ):
    names = (f"{theirs}conv{i + 1}.", f"{theirs}bn{i + 1}.")
    table += _unit(*names, f"{ours}/{name}", size, layers)
  return table


def _unit(conv, norm, ours, size, layers=None):
  """A convolution, and its batch norm with what it keeps."""
  into, out, side = size.split()
  into = f"{into}'" if into == out else into
  params, kept, same = f"params/{ours}", f"memory/{ours}/norm", f"{out} -> {out}"
  count = ("int64", "int32")
  return [
    rules.Rule(
      f"{conv}weight",
      f"{params}/conv/kernel",
      f"{out} {into} p{side} q{side} -> p{side} q{side} {into} {out}",
      layers,
    ),
    *towers.norm_rules(norm, f"{params}/norm", out, layers),
    rules.Rule(f"{norm}running_mean", f"{kept}/mean", same, layers),
    rules.Rule(f"{norm}running_var", f"{kept}/variance", same, layers),
    rules.Rule(f"{norm}num_batches_tracked", f"{kept}/batches", "->", layers, count),
  ]


def _attention_rules(theirs, ours):
  fit = towers.resize_to(1)
  table = [
    rules.Rule(f"{theirs}positional_embedding", f"{ours}/posemb", "L W -> L W", fit=fit)
  ]
  for name in ("query", "key", "value"):
    weight, bias = (f"{theirs}{name[0]}_proj.{part}" for part in ("weight", "bias"))
    leaf = f"{ours}/attn/{name}"
    table += [
      rules.Rule(weight, f"{leaf}/kernel", "(M h) W -> W M h"),
      rules.Rule(bias, f"{leaf}/bias", "(M h) -> M h"),
    ]
  weight, bias = f"{theirs}c_proj.weight", f"{theirs}c_proj.bias"
  return [
    *table,
    rules.Rule(weight, f"{ours}/attn/out/kernel", "E (M h) -> M h E"),
    rules.Rule(bias, f"{ours}/attn/out/bias", "E -> E"),
  ]


def _fit(tensors, abstract, branch, path, *, skip=(), fresh=()):
  """The parameters, or the memory, of a model."""
  openai = clip.OPENAI in tensors
  if branch == "params":
    blocks, depth, sizes = _sizes(abstract)
  else:
    (blocks, depth), sizes = _depths(tensors, path), None
  whole = checkpoint_rules(blocks, depth, openai=openai)
  table = _strip(whole, branch)
  own = {name for rule in table for name in rules.names(rule)}
  other = {name for rule in whole for name in rules.names(rule)} - own
  return rules.from_theirs(
    {name: x for name, x in tensors.items() if name not in other},
    table,
    sizes=sizes,
    shapes=abstract,
    skip=skip,
    fresh=fresh,
    what=f"{path}, as {_what(openai)} for this model,",
  )


def _strip(table, branch):
  """The rules of one branch, and their paths below it."""
  prefix = f"{branch}/"
  kept = []
  for rule in table:
    if isinstance(rule, rules.Constant):
      kept += [rule] if branch == "params" else []
      continue
    paths = (rule.ours,) if isinstance(rule.ours, str) else rule.ours
    if paths[0].startswith(prefix):
      paths = tuple(path.removeprefix(prefix) for path in paths)
      kept.append(dataclasses.replace(rule, ours=paths))
  return kept


def _depths(tensors, path):
  """(blocks of each stage, depth of the text tower) of a file."""
  what = f"{path} is no CLIP checkpoint of a residual network"
  find = lambda layer: towers.depth(tensors, layer, what)
  blocks = tuple(find(f"visual.layer{i}.{{i}}.") for i in STAGES)
  return blocks, find("transformer.resblocks.{i}.")


def _sizes(params):
  """(blocks, depth of the text, letters) of a tree of ours."""
  leaves = tree_lib.flatten(params)
  image, query = "model/image", "attn/query/kernel"
  wanted = (f"{image}/{query}", f"model/text/blocks/{query}")
  missing = [path for path in wanted if path not in leaves]
  if missing or f"{image}/stage_0/first/narrow/conv/kernel" not in leaves:
    raise ValueError(
      "this model is no CLIP with a residual network and a text encoder: it has no"
      f" {', '.join(missing) or 'stages'}."
    )
  blocks = []
  for i in range(len(STAGES)):
    rest = leaves.get(f"{image}/stage_{i}/rest/narrow/conv/kernel")
    blocks.append(1 if rest is None else 1 + rest.shape[0])
  pool, text = (leaves[path].shape for path in wanted)
  return tuple(blocks), text[0], dict(M=pool[1], N=text[2])


def _what(openai):
  made = "OpenAI" if openai else "open_clip"
  return f"a CLIP checkpoint of {made} with a residual network"
