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
class Layout:
  """How someone names and arranges the tensors of a kind of model.

  Attributes:
    name: of the model, for messages.
    needs: what a model of this kind has, for the message to others.
    table: (**depths of the stacks, **what it has) -> rules.
    stacks: by the name of their depth.
    paths: of leaves that each such model has, beside the stacks.
    in_file, in_tree: (tensors), (params) -> what else `table` wants to know of them.
    unused: patterns of names that say nothing.
  """

  name: str
  needs: str
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
    depths = depths_in(tensors, self.stacks, f"{path} is no {self.name} checkpoint")
    return rules.from_theirs(
      tensors,
      self.table(**depths, **self.in_file(tensors)),
      sizes=heads_in(tensors, self.stacks, num_heads),
      skip=self.unused,
      what=f"the {self.name} checkpoint {path}",
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
      what=f"the {self.name} checkpoint {path}, for this model,",
    )

  def write(self, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """{name: tensor} of a tree of ours; gradients have the same tree."""
    table, sizes = self._of_tree(params)
    return rules.to_theirs(params, table, sizes=sizes)

  def left(self, tensors: Tensors) -> dict[str, np.ndarray]:
    """Those of a file that are `unused`."""
    return {k: x for k, x in tensors.items() if rules.matches(k, self.unused)}

  def _of_tree(self, params):
    """(table, sizes) of a tree of ours."""
    refusal = f"this model is not of {self.name}'s kind ({self.needs})"
    depths, sizes = of_tree(params, self.stacks, self.paths, refusal)
    return self.table(**depths, **self.in_tree(params)), sizes


def depths_in(
  tensors: Tensors, stacks: Mapping[str, Stack], what: str
) -> dict[str, int]:
  """{stack: depth} of a file; see `towers.depth` for `what` and errors."""
  return {name: towers.depth(tensors, s.theirs, what) for name, s in stacks.items()}


def heads_in(
  tensors: Tensors, stacks: Mapping[str, Stack], given: Mapping[str, int | None]
) -> dict[str, int]:
  """{letter: heads} of a file; see `towers.heads` for what is `given`, and errors."""
  return {
    s.letter: towers.heads(tensors, s.norm, given[s.option], s.option)
    for s in stacks.values()
  }


def of_tree(
  params: Mapping[str, Any],
  stacks: Mapping[str, Stack],
  paths: Sequence[str],
  refusal: str,
) -> tuple[dict[str, int], dict[str, int]]:
  """({stack: depth}, sizes) of a tree of ours: heads, and with `PATCH` p and q.

  Args:
    params: without boxes. stacks: of which it has all. paths: that it has beside them.
    refusal: see `shapes`.
  """
  found = shapes(params, [*(s.query for s in stacks.values()), *paths], refusal)
  depths = {name: found[s.query][0] for name, s in stacks.items()}
  sizes = sides(found[PATCH]) if PATCH in paths else {}
  for stack in stacks.values():
    sizes.setdefault(stack.letter, found[stack.query][2])
  return depths, sizes


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
