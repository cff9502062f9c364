"""A program that is compiled as one, and called."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax


@dataclasses.dataclass
class Program:
  """A jitted function, the arguments it takes, and what it was compiled to.

  Attributes:
    name: "step", or the stage of one. fn: jitted; `lower` is called where its mesh is
      set, inside of `sharding.use(…)`.
    args: ShapeDtypeStructs with shardings. times: it runs so often in a step; less
      than once, where steps read different kinds of data.
    options: of the compiler, over those of the environment.
    compiled: takes what `fn` takes; None: not yet, and a call has JAX see to it.
  """

  name: str
  fn: Any
  args: tuple[Any, ...]
  times: float = 1
  options: Mapping[str, Any] | None = None
  compiled: Callable | None = None

  def lower(self) -> jax.stages.Lowered:
    return self.fn.lower(*self.args)

  def compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    return lowered.compile(dict(self.options) if self.options else None)

  def __call__(self, *args: Any) -> Any:
    """Its results for arrays of these shapes, in these places.

    JAX's ways to look into a function (JAX_DISABLE_JIT, JAX_DEBUG_NANS, JAX_DEBUG_INFS)
    want the function itself.
    """
    looks = jax.config.jax_disable_jit
    looks = looks or jax.config.jax_debug_nans or jax.config.jax_debug_infs
    return self.fn(*args) if self.compiled is None or looks else self.compiled(*args)
