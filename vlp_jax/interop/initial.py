"""Weights to start from: `c.init = dict(type="albef", path=…)`."""

from collections.abc import Mapping
import importlib
import inspect
from typing import Any


def load(spec: Mapping[str, Any], params: Any, model: Any = None) -> Any:
  """The parameters of a run, as the file of `interop/` that `spec` names makes them.

  Args:
    spec: `config.init`; "type" is that file's name, the rest arguments of its `init`.
    params: the run's own, fresh parameters (unboxed).
    model: the run's `VLM`, for formats that check its layers as well.

  Raises:
    ValueError: no such format, or the weights do not fit.
  """
  spec = dict(spec)
  name = spec.pop("type", None)
  if name not in FORMATS:
    raise ValueError(f"config: init.type={name!r}: there are {', '.join(FORMATS)}.")
  module = importlib.import_module(f"vlp_jax.interop.{name}")
  if "model" in inspect.signature(module.init).parameters:
    spec["model"] = model
  return module.init(params, **spec)


FORMATS = ("albef", "clip", "hf_dual", "hf_vit", "open_clip")
