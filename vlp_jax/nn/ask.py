"""Ways of calling a module of the pretrainer: live, its teacher, free, or a writer.

The first two are called as `ask(module, "method", *args)`, so a forward pass that
student and teacher share (the MLM head, the towers) is written once.
"""

from collections.abc import Callable, Mapping
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

  What its layers keep beside parameters (running statistics of batch norm) is the live
  module's: the teacher reads it, and writes nothing.

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
    variables = {"params": params}
    if kept := module.variables.get("memory"):
      variables["memory"] = jax.lax.stop_gradient(kept)
    out = free.apply(variables, *args, method=method, **more)
    return jax.lax.stop_gradient(out)


@dataclasses.dataclass(frozen=True)
class Free:
  """The live module as a pure function, for the body of a scan; reads `params` alone.

  Attributes:
    module: a free copy of it. params: its own, through which the gradient goes.
  """

  module: nn.Module
  params: Mapping[str, Any]

  def __call__(self, method: str, *args: Any) -> Any:
    return self.module.apply({"params": self.params}, *args, method=method)

  def bound(self) -> nn.Module:
    """As an argument of another one's method."""
    return self.module.bind({"params": self.params})


def free(module: nn.Module) -> Free:
  """The Free of a bound module; of one without parameters, without any."""
  return Free(module.clone(parent=None, name=None), module.variables.get("params", {}))


@dataclasses.dataclass(frozen=True)
class Writer:
  """A live module that reads a text in parts, as it is written, and each part once.

  What its layers keep goes through the caller's hands, so that it may stand in the
  carry of a scan: trees of [layers, rows, …].

  Attributes:
    module: a free copy of it. params: its own.
    read: (module, *args) -> out; hands the layers a `mask_lib.Writing`.
  """

  module: nn.Module
  params: Mapping[str, Any]
  read: Callable[..., Any]

  def begin(self, *args: Any) -> tuple[Any, Any, Any]:
    """(out, what is given: kept once and for all, what is written so far)."""
    out, kept = self._apply({}, ["given", "written"], *args)
    return out, kept.get("given", {}), kept["written"]

  def go_on(self, given: Any, written: Any, *args: Any) -> tuple[Any, Any]:
    """(out, what is written now)."""
    kept = {"given": given, "written": written}
    out, kept = self._apply(kept, ["written"], *args)
    return out, kept["written"]

  def _apply(self, kept, mutable, *args):
    variables = {"params": self.params} | kept
    return self.module.apply(variables, *args, method=self.read, mutable=mutable)


def writer(module: nn.Module, read: Callable[..., Any]) -> Writer:
  """The Writer of a bound module."""
  own = free(module)
  return Writer(own.module, own.params, read)
