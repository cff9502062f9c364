"""Trees of arrays, addressed by the path of a leaf: "model/image/norm/scale"."""

from collections.abc import Callable
from typing import Any

import jax


def path_name(path: tuple) -> str:
  """The keys of a jax key path, joined by slashes.

  A box that carries the logical axes of a leaf is no level of its own.
  """
  if path and getattr(path[-1], "name", None) == "value":
    path = path[:-1]
  names = [
    getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))) for key in path
  ]
  return "/".join(str(name) for name in names)


def flatten(tree: Any) -> dict[str, Any]:
  """{path: leaf}, in the tree's own order."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {path_name(path): leaf for path, leaf in leaves}


def map_with_path(fn: Callable, tree: Any, *rest: Any) -> Any:
  """`jax.tree.map` whose function takes the path of the leaf first."""
  return jax.tree_util.tree_map_with_path(
    lambda path, *leaves: fn(path_name(path), *leaves), tree, *rest
  )


def size(tree: Any) -> int:
  """How many numbers the tree holds."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def ema(average: Any, new: Any, *, decay: float) -> Any:
  """Exponential moving average of two trees: decay * average + (1 - decay) * new."""
  return jax.tree.map(lambda a, b: decay * a + (1.0 - decay) * b, average, new)
