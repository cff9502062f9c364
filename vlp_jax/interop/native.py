"""Checkpoints of other formats in our own layout: a folder of trees, one file each.

  params.safetensors   the paths of our tree and its arrays; so are ema and memory
  checkpoint.json      the format it came from, and what else that format needs

`vlp-jax convert` writes such folders; `c.init = dict(type="native", path=…)` starts a
run of them.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from vlp_jax.interop import reader
from vlp_jax.interop import rules
from vlp_jax.ops import tree as tree_lib

FILE = "checkpoint.json"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """format: a file of this folder, or None. fields: of its `Checkpoint`."""

  format: str | None
  fields: dict[str, Any]


def save(path: str | os.PathLike, checkpoint: Checkpoint) -> None:
  """Writes the folder.

  Raises:
    ValueError: a field is neither a tree of arrays nor plain data, or the folder has
      another checkpoint.
  """
  path = pathlib.Path(path)
  if (path / FILE).exists():
    raise ValueError(f"{path} has a checkpoint already: name another folder.")
  path.mkdir(parents=True, exist_ok=True)
  trees, plain = [], {}
  for name, value in checkpoint.fields.items():
    if _is_tree(value):
      leaves = {key: np.asarray(x) for key, x in tree_lib.flatten(value).items()}
      reader.save(path / f"{name}.safetensors", leaves)
      trees.append(name)
    else:
      plain[name] = value
  content = dict(
    version=VERSION, format=checkpoint.format, trees=sorted(trees), fields=plain
  )
  try:
    text = json.dumps(content, indent=2)
  except TypeError as error:
    raise ValueError(f"{path}: a field is no plain data: {error}.") from error
  (path / FILE).write_text(text + "\n", "utf-8")


def load(path: str | os.PathLike) -> Checkpoint:
  """Reads the folder.

  Raises:
    FileNotFoundError, ValueError: it is none, or lacks a file.
  """
  path = pathlib.Path(path)
  if not (path / FILE).is_file():
    raise FileNotFoundError(f"{path} has no {FILE}: want a folder of vlp-jax convert.")
  try:
    content = json.loads((path / FILE).read_text("utf-8"))
    version, kind, trees = content["version"], content["format"], content["trees"]
    fields = dict(content["fields"])
  except (ValueError, LookupError, TypeError) as error:
    raise ValueError(f"{path / FILE} is damaged: {error!r}.") from error
  if version != VERSION:
    raise ValueError(f"{path / FILE}: version {version}, but this reads {VERSION}.")
  for name in trees:
    if pathlib.PurePath(name).name != name:
      raise ValueError(f"{path / FILE}: {name!r} is no file of this folder.")
    fields[name] = rules.nest(reader.load(path / f"{name}.safetensors"))
  return Checkpoint(kind, fields)


def init(
  abstract_params: Mapping[str, Any],
  *,
  path: str | os.PathLike,
  skip: Sequence[str] = (),
  fresh: Sequence[str] = (),
) -> dict[str, Any]:
  """Parameters of a model from such a folder.

  Args:
    abstract_params: the model's tree, without boxes; leaves have shape and dtype.
    path: the folder.
    skip: regular expressions of whole paths in the folder that the model does not use.
    fresh: of whole paths of the model that the folder does not have.

  Raises:
    FileNotFoundError, ValueError: one error that lists all that does not fit.
  """
  params = load(path).fields.get("params")
  if params is None:
    raise ValueError(f"{path} has no params.safetensors.")
  faults = rules.Faults(f"the checkpoint {path}, for this model,")
  wanted = tree_lib.flatten(abstract_params)
  found = {
    name: x
    for name, x in tree_lib.flatten(params).items()
    if not rules.matches(name, skip)
  }
  for name, x in found.items():
    if name not in wanted:
      faults.add("leaves that the model has no place for", f"{name} {list(x.shape)}")
  filled = dict(wanted)
  for name, want in wanted.items():
    if name not in found:
      if not rules.matches(name, fresh):
        faults.add("missing leaves", f"{name} {list(want.shape)}")
    elif found[name].shape != want.shape:
      shapes = f"file {list(found[name].shape)}, model {list(want.shape)}"
      faults.add("wrong shapes", f"{name}: {shapes}")
    else:
      filled[name] = found[name].astype(want.dtype)
  faults.check()
  return rules.nest(filled)


def _is_tree(value):
  """A tree with leaves, all of them arrays."""
  if not isinstance(value, Mapping):
    return False
  leaves = jax.tree.leaves(value)
  return bool(leaves) and all(isinstance(x, np.ndarray | np.generic) for x in leaves)
