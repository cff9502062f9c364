"""Where a file, and where a tree of ours, tell what a table of rules has to know.

A table is made for a model of some depth, with some heads. Depth and heads of attention
of each stack of layers are read from a file, to load it, or from a tree, to write it or
to start it from a file: see `Layout`, and `dual` for two towers.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import os
from typing import Any

import numpy as np

from vlp_jax.interop import rules
from vlp_jax.interop import towers
from vlp_jax.ops import tree as tree_lib

PATCH = "model/image/patch/kernel"

Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What a file holds: params, a tree of ours."""

  params: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Carrying:
  """What a file holds.

  params: a tree of ours. unused: {name: tensor} that the official model carries along
  and ours has no use for, so that what is written is what was read.
  """

  params: dict[str, Any]
  unused: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Stack:
  """Layers that are alike.

  Attributes:
    theirs: prefix of their names in a file, `{i}` for the layer.
    query: path of the kernel [layer, width, heads, head_dim] in a tree of ours.
    letter: of the heads in the table; stacks of one letter have as many heads.
    norm: name of a tensor of theirs that is as long as the stack is wide.
    option: how `load` is told the heads, which no shape tells, for messages.
  """

  theirs: str
  query: str
  letter: str
  norm: str
  option: str = "num_heads"


@dataclasses.dataclass(frozen=True)
class Words:
  """How messages begin; `{path}` stands for that of the file.

  file, fitted: what does not fit the table, or a model. other_file, other_model: of
  what is of another kind. written: what was to be written.
  """

  file: str
  fitted: str
  other_file: str
  other_model: str
  written: str = "the parameters"


def words(name: str, needs: str) -> Words:
  """Of the checkpoints of a model of this name, which has what it `needs`."""
  return Words(
    file=f"the {name} checkpoint {{path}}",
    fitted=f"the {name} checkpoint {{path}}, for this model,",
    other_file=f"{{path}} is no {name} checkpoint",
    other_model=f"this model is not of {name}'s kind ({needs})",
  )


@dataclasses.dataclass(frozen=True)
class Layout:
  """How someone names and arranges the tensors of a kind of model.

  Attributes:
    words: of its messages.
    table: (**depths of the stacks, **what it has) -> rules.
    stacks: by the name of their depth.
    paths: of leaves that each such model has, beside the stacks.
    in_file, in_tree: (tensors), (params) -> what else `table` wants to know of them.
    unused: patterns of names that say nothing.
  """

  words: Words
  table: Callable[..., rules.Table]
  stacks: Mapping[str, Stack]
  paths: Sequence[str] = (PATCH,)
  in_file: Callable[[Tensors], dict[str, Any]] = lambda tensors: {}
  in_tree: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda params: {}
  unused: tuple[str, ...] = ()

  def read(
    self, tensors: Tensors, path: str | os.PathLike, **num_heads: int | None
  ) -> dict[str, Any]:
    """Parameters as they are in the file, with its types.

    Args:
      tensors: of the file. path: for messages.
      **num_heads: by the options of the stacks; None: of 64 each.

    Raises:
      ValueError: it is no such file; see `towers.heads` and `rules.from_theirs`.
    """
    other = self.words.other_file.format(path=path)
    depths = {k: towers.depth(tensors, s.theirs, other) for k, s in self.stacks.items()}
    heads = {
      s.letter: towers.heads(tensors, s.norm, num_heads[s.option], s.option)
      for s in self.stacks.values()
    }
    return rules.from_theirs(
      tensors,
      self.table(**depths, **self.in_file(tensors)),
      sizes=heads,
      skip=self.unused,
      what=self.words.file.format(path=path),
    )

  def fit(
    self,
    read: Callable[[], Tensors],
    path: str | os.PathLike,
    abstract_params: Mapping[str, Any],
    *,
    skip: Sequence[str] = (),
    fresh: Sequence[str] = (),
  ) -> dict[str, Any]:
    """Parameters of a model from a file.

    Args:
      read: for the tensors, which may be large: called when the model is of this kind.
      path: for messages.
      abstract_params: the model's tree, without boxes; leaves have shape and dtype.
      skip, fresh: see `rules.from_theirs`.

    Raises:
      ValueError: the model is of another kind; see `rules.from_theirs`.
    """
    table, sizes = self._of_tree(abstract_params)
    return rules.from_theirs(
      read(),
      table,
      sizes=sizes,
      shapes=abstract_params,
      skip=(*self.unused, *skip),
      fresh=fresh,
      what=self.words.fitted.format(path=path),
    )

  def write(self, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """{name: tensor} of a tree of ours; gradients have the same tree."""
    table, sizes = self._of_tree(params)
    return rules.to_theirs(params, table, sizes=sizes, what=self.words.written)

  def left(self, tensors: Tensors) -> dict[str, np.ndarray]:
    """Those of a file that are `unused`."""
    return {k: x for k, x in tensors.items() if rules.matches(k, self.unused)}

  def _of_tree(self, params):
    """(table, sizes) of a tree of ours: heads, and with `PATCH` p and q."""
    stacks = self.stacks
    paths = [*(stack.query for stack in stacks.values()), *self.paths]
    found = shapes(params, paths, self.words.other_model)
    depths = {name: found[stack.query][0] for name, stack in stacks.items()}
    sizes = {stack.letter: found[stack.query][2] for stack in stacks.values()}
    if PATCH in self.paths:
      sizes |= sides(found[PATCH])
    return self.table(**depths, **self.in_tree(params)), sizes


def shapes(
  params: Mapping[str, Any], paths: Sequence[str], refusal: str
) -> dict[str, tuple[int, ...]]:
  """{path: shape} of leaves of a tree of ours.

  Raises:
    ValueError: there is no such leaf: `refusal`, and which it does not have.
  """
  leaves = tree_lib.flatten(params)
  missing = [path for path in paths if path not in leaves]
  if missing:
    raise ValueError(f"{refusal}: it has no {', '.join(missing)}.")
  return {path: leaves[path].shape for path in paths}


def sides(patch: tuple[int, ...]) -> dict[str, int]:
  """{"p", "q"}: sides of the patches of a kernel [p * q * 3, width]."""
  side = round((patch[0] / 3) ** 0.5)
  return dict(p=side, q=side)
