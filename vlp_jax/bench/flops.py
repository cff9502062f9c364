"""Model FLOPs: the multiplications and additions of all matrix products of a function.

Counted on its jaxpr, so that layers of a scan count as often as they run, which XLA's
own cost analysis does not know. What is elementwise does not count, as in PaLM's model
FLOPs utilisation (appendix B of https://arxiv.org/abs/2204.02311); what a gradient
recomputes does, so trace it without rematerialisation.
"""

from collections.abc import Callable
import math
from typing import Any

import jax


def count(function: Callable, *args: Any) -> int:
  """FLOPs of `function(*args)`; the arguments may be shapes."""
  return _of(jax.make_jaxpr(function)(*args).jaxpr)


def _of(jaxpr):
  return sum(map(_equation, jaxpr.eqns))


def _equation(eqn):
  kind, params = eqn.primitive.name, eqn.params
  if kind == "dot_general":
    (summed, _), _ = params["dimension_numbers"]
    left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    return 2 * math.prod(out) * math.prod(left[i] for i in summed)
  if kind == "conv_general_dilated":
    kernel = eqn.invars[1].aval.shape
    out_features = params["dimension_numbers"].rhs_spec[0]
    inner = math.prod(kernel) // kernel[out_features]
    return 2 * math.prod(eqn.outvars[0].aval.shape) * inner
  if kind == "cond":
    # One branch runs: the dearest.
    return max(_of(branch.jaxpr) for branch in params["branches"])
  times = params["length"] if kind == "scan" else 1
  return times * sum(_of(inner) for inner in _inner(params.values()))


def _inner(values):
  """The jaxprs among the parameters of an equation."""
  for value in values:
    if isinstance(value, (tuple, list)):
      yield from _inner(value)
    elif hasattr(value, "jaxpr"):
      yield value.jaxpr
    elif hasattr(value, "eqns"):
      yield value
