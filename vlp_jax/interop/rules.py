"""Tables that translate a checkpoint of someone else's into a tree of ours, and back.

A rule names their tensor, our leaf, and in letters how one becomes the other:

  Rule("blocks.{i}.attn.proj.weight", "image/blocks/attn/out/kernel",
       "D (N H) -> N H D", layers=range(12))

reads twelve matrices [D, N * H], and stacks them to one leaf [12, N, H, D]. A letter
stands for one size in the whole table, so a table also says what fits together. Every
tensor of the file and every leaf of the tree has its rule, or is an error.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import re
from typing import Any

import numpy as np

from vlp_jax.interop import letters
from vlp_jax.ops import tree as tree_lib


@dataclasses.dataclass(frozen=True)
class Rule:
  """Some tensors of theirs <-> some leaves of ours.

  Attributes:
    theirs: name of their tensor, `{i}` for the layer, `{i+1}` for the next. Several
      names are copies of one tensor (tied weights): a file has one or more, which must
      agree; all are written.
    ours: path of our leaf. Several paths share out the leading axis of the right side
      (fused query, key and value).
    axes: "left -> right", an axis being a letter, a number, or several in parentheses
      that were made one (`letters`); both sides have the same ones.
    layers: where `{i}` runs; our leaf has them as its leading axis.
    dtype: (theirs, ours), where they differ.
    fit: (leaf, wanted shape) -> leaf, where a model wants another shape than the file
      has (position tables); may raise ValueError.
  """

  theirs: str | tuple[str, ...]
  ours: str | tuple[str, ...]
  axes: str
  layers: range | None = None
  dtype: tuple[str, str] | None = None
  fit: Callable[[np.ndarray, tuple[int, ...]], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Constant:
  """A tensor of theirs that says nothing: checked where it is, written always."""

  theirs: str
  value: Callable[[letters.Sizes], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Fill:
  """A leaf of ours that their files do not have; not written back."""

  ours: str
  value: Callable[[letters.Sizes], np.ndarray]


Table = Sequence[Rule | Constant | Fill]


class Faults:
  """What is wrong, collected, so that one error tells all of it."""

  def __init__(self, what: str):
    self.what = what
    self.found = collections.defaultdict(list)

  def add(self, kind: str, text: str) -> None:
    self.found[kind].append(text)

  def check(self) -> None:
    """Raises ValueError if anything was added."""
    if self.found:
      parts = [
        f"  {kind} ({len(texts)}):\n" + "\n".join(f"    {text}" for text in texts)
        for kind, texts in self.found.items()
      ]
      raise ValueError("\n".join([f"{self.what} does not fit:", *parts]))


def from_theirs(
  tensors: Mapping[str, np.ndarray],
  table: Table,
  *,
  sizes: letters.Sizes | None = None,
  shapes: Mapping[str, Any] | None = None,
  skip: Sequence[str] = (),
  fresh: Sequence[str] = (),
  what: str = "the checkpoint",
) -> dict[str, Any]:
  """Their tensors as a tree of ours; a round trip gives the same bits.

  Args:
    tensors: name to array.
    table: the rules.
    sizes: letters whose size the shapes do not tell (heads).
    shapes: a tree of ours whose leaves have shape and dtype, which the result must
      have: rules may resize (`Rule.fit`), floats become the wanted float.
    skip: regular expressions of whole names of theirs to leave out.
    fresh: with `shapes`: of whole paths of ours that the file need not have; the
      result has there the leaf of `shapes`.
    what: the checkpoint, for the message.

  Raises:
    ValueError: one that lists every unknown, missing or contradictory tensor and
      every wrong shape.
  """
  faults = Faults(what)
  tensors = {name: x for name, x in tensors.items() if not matches(name, skip)}
  wanted = needed = None
  if shapes is not None:
    wanted = tree_lib.flatten(shapes)
    needed = {path for path in wanted if not matches(path, fresh)}
  known = {name for rule in table for name in names(rule)}
  for name in tensors:
    if name not in known:
      faults.add("unknown tensors", f"{name} {list(tensors[name].shape)}")
  seen = [
    (tensors[name].shape, _sides(rule)[0])
    for rule in table
    if isinstance(rule, Rule)
    for name in names(rule)
    if name in tensors
  ]
  sizes = letters.vote(seen, sizes or {})
  leaves = {}
  for rule in table:
    if isinstance(rule, Rule):
      leaves |= _load(rule, tensors, sizes, needed, faults)
    elif isinstance(rule, Constant) and rule.theirs in tensors:
      _check_constant(rule, tensors[rule.theirs], sizes, faults)
  for rule in table:
    if isinstance(rule, Fill):
      leaves[rule.ours] = _value(rule, sizes, faults)
  if wanted is not None:
    leaves = _fit(leaves, wanted, table, needed, faults)
  faults.check()
  return nest(leaves)


def fill(
  abstract: Mapping[str, Any],
  below: Sequence[str],
  tensors: Mapping[str, np.ndarray],
  table: Table,
  *,
  sizes: letters.Sizes | None = None,
  skip: Sequence[str] = (),
  fresh: Sequence[str] = (),
  what: str = "the checkpoint",
) -> dict[str, Any]:
  """A tree of ours of which only some branches come from their tensors.

  Args:
    abstract: the whole tree; leaves have shape and dtype.
    below: paths of the branches that the tensors must fill, but for `fresh`.
    tensors, table, sizes, skip, fresh, what: as of `from_theirs`.

  Returns:
    The tree, with the leaf of `abstract` where nothing came.

  Raises:
    ValueError: as `from_theirs`, and a branch that the tree does not have.
  """
  leaves = tree_lib.flatten(abstract)
  branches = {
    name: leaf
    for name, leaf in leaves.items()
    if any(name.startswith(f"{path}/") for path in below)
  }
  for path in below:
    if not any(name.startswith(f"{path}/") for name in branches):
      there = sorted({"/".join(name.split("/")[:2]) for name in leaves})
      raise ValueError(
        f"{what}: into={path!r}: the model has no such branch; it has"
        f" {', '.join(there)}."
      )
  found = from_theirs(
    tensors,
    table,
    sizes=sizes,
    shapes=nest(branches),
    skip=skip,
    fresh=fresh,
    what=what,
  )
  return nest(leaves | tree_lib.flatten(found))


def to_theirs(
  tree: Mapping[str, Any],
  table: Table,
  *,
  sizes: letters.Sizes | None = None,
  what: str = "the parameters",
) -> dict[str, np.ndarray]:
  """A tree of ours as their tensors, in the order of the table.

  Raises:
    ValueError: one that lists every leaf without a rule, every missing leaf and every
      wrong shape.
  """
  faults = Faults(what)
  leaves = {path: np.asarray(leaf) for path, leaf in tree_lib.flatten(tree).items()}
  known = {p for rule in table if not isinstance(rule, Constant) for p in _paths(rule)}
  for path, leaf in leaves.items():
    if path not in known:
      faults.add(
        "leaves that the format has no place for", f"{path} {list(leaf.shape)}"
      )
  seen = [
    (_layer_shape(leaves[path].shape, rule), _sides(rule)[1])
    for rule in table
    if isinstance(rule, Rule)
    for path in _paths(rule)
    if path in leaves
  ]
  sizes = letters.vote(seen, sizes or {})
  tensors = {}
  for rule in table:
    if isinstance(rule, Rule):
      tensors |= _dump(rule, leaves, sizes, faults)
    elif isinstance(rule, Constant):
      tensors[rule.theirs] = _value(rule, sizes, faults)
  faults.check()
  return tensors


def relabel(table: Table, letters: Mapping[str, str]) -> list[Rule | Constant | Fill]:
  """The table with other letters, for a second tower of other sizes: {"D": "E"}.

  Only rules; constants and fills name their sizes themselves.
  """

  def rename(rule):
    if not isinstance(rule, Rule):
      return rule
    swap = lambda found: letters.get(found[0], found[0])
    return dataclasses.replace(rule, axes=re.sub(r"[A-Za-z]+", swap, rule.axes))

  return [rename(rule) for rule in table]


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """{"a/b": leaf} -> {"a": {"b": leaf}}."""
  tree = {}
  for path, leaf in leaves.items():
    *parents, last = path.split("/")
    node = tree
    for name in parents:
      node = node.setdefault(name, {})
    node[last] = leaf
  return tree


def _sides(rule):
  left, right = (side.strip() for side in rule.axes.split("->"))
  return left, right


def _tuple(x):
  return (x,) if isinstance(x, str) else tuple(x)


def _paths(rule):
  return _tuple(rule.ours)


def names(rule: Rule | Constant | Fill, layer: int | None = None) -> tuple[str, ...]:
  """Names of their tensors, of all layers or of one."""
  if isinstance(rule, Fill):
    return ()
  if isinstance(rule, Constant):
    return (rule.theirs,)
  layers = [layer] if layer is not None or rule.layers is None else rule.layers
  return tuple(
    name if i is None else name.replace("{i}", str(i)).replace("{i+1}", str(i + 1))
    for i in layers
    for name in _tuple(rule.theirs)
  )


def _layer_shape(shape, rule):
  """Of what the right side describes: one layer of a leaf, all leaves stacked."""
  shape = shape if rule.layers is None else shape[1:]
  count = len(_paths(rule))
  return shape if count == 1 else (count, *shape)


def matches(name: str, patterns: Sequence[str]) -> bool:
  """Whether one of the regular expressions is of the whole name."""
  return any(re.fullmatch(pattern, name) for pattern in patterns)


def _same(a, b):
  return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _load(rule, tensors, sizes, needed, faults):
  """{path: leaf} of one rule; what is wrong goes to `faults`."""
  left, right = _sides(rule)
  paths = _paths(rule)
  layers = []
  for i in [None] if rule.layers is None else rule.layers:
    theirs = names(rule, i)
    found = [name for name in theirs if name in tensors]
    if not found:
      if needed is None or not needed.isdisjoint(paths):
        text = f"{' or '.join(theirs)} [{left}], for {', '.join(paths)}"
        faults.add("missing tensors", text)
      continue
    first = tensors[found[0]]
    for name in found[1:]:
      if not _same(first, tensors[name]):
        faults.add("tied tensors that differ", f"{found[0]} and {name}")
    try:
      x = letters.rearrange(first, left, right, sizes)
    except ValueError as e:
      text = f"{found[0]} {list(first.shape)} is not [{left}]: {e}"
      faults.add("wrong shapes", text)
      continue
    if rule.dtype is not None:
      x = x.astype(rule.dtype[1])
    layers.append(x if len(paths) > 1 else x[None])
  # None of them, too, where a tower has no layers.
  if not layers or len(layers) < (1 if rule.layers is None else len(rule.layers)):
    return {}
  if rule.layers is None:
    return {path: np.asarray(x) for path, x in zip(paths, layers[0], strict=True)}
  if len({x.dtype for x in layers}) > 1:
    faults.add("layers of several types", ", ".join(_tuple(rule.theirs)))
  return {path: np.stack([x[k] for x in layers]) for k, path in enumerate(paths)}


def _dump(rule, leaves, sizes, faults):
  """{name: tensor} of one rule."""
  left, right = _sides(rule)
  paths = _paths(rule)
  missing = [path for path in paths if path not in leaves]
  for path in missing:
    faults.add("missing leaves", path)
  if missing:
    return {}
  parts = [leaves[path] for path in paths]
  tensors = {}
  for k, i in enumerate([None] if rule.layers is None else rule.layers):
    try:
      if rule.layers is not None and any(
        x.ndim == 0 or len(x) != len(rule.layers) for x in parts
      ):
        raise ValueError(f"not of {len(rule.layers)} layers")
      layer = parts if rule.layers is None else [x[k] for x in parts]
      x = np.stack(layer) if len(paths) > 1 else layer[0]
      x = np.asarray(letters.rearrange(x, right, left, sizes), order="C")
    except ValueError as e:
      shapes = " ".join(str(list(x.shape)) for x in parts)
      faults.add("wrong shapes", f"{', '.join(paths)} {shapes} is not [{right}]: {e}")
      return {}
    if rule.dtype is not None:
      x = x.astype(rule.dtype[0])
    tensors |= dict.fromkeys(names(rule, i), x)
  return tensors


def _value(rule, sizes, faults):
  try:
    return rule.value(sizes)
  except KeyError as e:
    name = rule.theirs if isinstance(rule, Constant) else rule.ours
    faults.add("values that cannot be made", f"{name}: the size {e} is not known")
    return None


def _check_constant(rule, x, sizes, faults):
  want = _value(rule, sizes, faults)
  if want is not None and not _same(np.asarray(want), x):
    faults.add("constants of another value", f"{rule.theirs} {list(x.shape)}")


def _fit(leaves, wanted, table, needed, faults):
  """Leaves of the wanted shapes and dtypes."""
  rules = {p: rule for rule in table if isinstance(rule, Rule) for p in _paths(rule)}
  fitted = {}
  for path, want in wanted.items():
    if path not in leaves:
      if path not in needed:
        fitted[path] = want
      elif path not in rules:
        faults.add("leaves of the model that the format does not have", path)
      continue
    leaf = stored = leaves[path]
    try:
      if leaf.shape != want.shape and path in rules and rules[path].fit is not None:
        leaf = rules[path].fit(leaf, want.shape)
      if leaf.shape != want.shape:
        raise ValueError("")
    except ValueError as e:
      found = f"{path}: file {list(stored.shape)}, model {list(want.shape)}"
      faults.add("wrong shapes", f"{found}: {e}" if str(e) else found)
      continue
    if leaf.dtype != want.dtype and leaf.dtype.kind in "fV" and want.dtype.kind in "fV":
      leaf = leaf.astype(want.dtype)
    if leaf.dtype != want.dtype:
      faults.add("wrong types", f"{path}: file {leaf.dtype}, model {want.dtype}")
    fitted[path] = leaf
  for path in leaves.keys() - wanted.keys():
    theirs = ", ".join(_tuple(rules[path].theirs)) if path in rules else "-"
    faults.add("tensors that the model has no place for", f"{theirs} -> {path}")
  return fitted
