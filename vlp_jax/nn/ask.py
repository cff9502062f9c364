"""Two ways of calling a module of the pretrainer: the live one, or its teacher.

Both are called as `ask(module, "method", *args)`, so a forward pass that student and
teacher share (the MLM head, the towers) is written once.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import flax.linen as nn
import jax

# The methods of a model that drop out in training, and take `train`.
DROPS_OUT = ("encode_image", "encode_text", "words", "fuse", "decode")


@dataclasses.dataclass(frozen=True)
class Live:
  """The module itself, with gradient, and with dropout where `train`."""

  train: bool = False

  def __call__(self, module: nn.Module, method: str, *args: Any, **more: Any) -> Any:
    extra = {"train": self.train} if method in DROPS_OUT else {}
    return getattr(module, method)(*args, **more, **extra)


@dataclasses.dataclass(frozen=True)
class Teacher:
  """The module under the moving average of its parameters: no gradient, no dropout.

  Attributes:
    params: tree of the whole pretrainer's averaged parameters; a module finds its own
      by its path.
    enc: the batch as the teacher encodes it (`pretrainer.Encoded`).
  """

  params: Mapping[str, Any]
  enc: Any = None

  def __call__(self, module: nn.Module, method: str, *args: Any, **more: Any) -> Any:
    params = self.params
    for name in module.path:
      # A module without parameters has no branch in the tree.
      params = params.get(name, {})
    free = module.clone(parent=None, name=None)
    args = jax.lax.stop_gradient(args)
    out = free.apply({"params": params}, *args, method=method, **more)
    return jax.lax.stop_gradient(out)
