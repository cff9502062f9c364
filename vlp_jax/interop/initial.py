"""Weights to start from: `c.init = dict(type="albef", path=…)`, or parts of a model.

  c.init = dict(
    image=dict(type="timm_vit", path="deit_base.pth"),
    text=dict(
      type="hf_bert",
      path="bert-base-uncased",
      into=dict(text="model/text", fusion="model/fusion", mlm="objectives_mlm"),
    ),
  )

starts ALBEF as its official code does. What no part fills is drawn as always.
"""

from collections.abc import Mapping
import importlib
import inspect
import pathlib
from typing import Any

import jax

from vlp_jax.interop import rules
from vlp_jax.ops import tree as tree_lib


def load(spec: Mapping[str, Any], params: Any, *, model: Any = None) -> Any:
  """The parameters of a run, as the files of `interop/` that `spec` names make them.

  Args:
    spec: `config.init`; "type" is a file's name, the rest arguments of its `init`. Or
      {name: such a spec}, each of which fills a part of the model.
    params: the run's own, fresh parameters (unboxed), or their shapes.
    model: the VLM, for formats that compare it with what their files say.

  Returns:
    The tree of `params`, with the leaf of `params` where no file has one.

  Raises:
    ValueError: no such format, the weights do not fit, or two parts fill one leaf.
  """
  if isinstance(spec.get("type"), str):
    return _part(spec, params, model, "init")
  if "type" in spec or not spec:
    raise ValueError(
      f"config: init.type={spec.get('type')!r}: there are {', '.join(formats())}."
    )
  filled, owner = tree_lib.flatten(params), {}
  for name, part in spec.items():
    if not isinstance(part, Mapping):
      raise ValueError(
        f"config: init.{name}={part!r}: want dict(type=…, path=…), or init.type beside"
        f" it; there are {', '.join(formats())}."
      )
    found = tree_lib.flatten(_part(part, params, model, f"init.{name}"))
    for path, leaf in found.items():
      if isinstance(leaf, jax.ShapeDtypeStruct) or leaf is filled[path]:
        continue
      if path in owner:
        raise ValueError(
          f"config: init.{name} and init.{owner[path]} both fill {path}."
        )
      filled[path], owner[path] = leaf, name
  return rules.nest(filled)


def load_memory(spec: Mapping[str, Any], memory: Any) -> Any:
  """What a run keeps beside its parameters, filled from the same files.

  Args:
    spec: as of `load`.
    memory: of the run's train state (unboxed), or its shapes.

  Returns:
    The tree of `memory`, with the leaf of `memory` where no file has one: a format has
    some if it exports `memory` (running statistics of batch norm).
  """
  parts = [spec] if isinstance(spec.get("type"), str) else spec.values()
  for part in parts:
    part = dict(part)
    module = importlib.import_module(f"vlp_jax.interop.{part.pop('type')}")
    if hasattr(module, "memory"):
      memory = module.memory(memory, **part)
  return memory


def formats() -> list[str]:
  """The files of this folder that a model can start from: those with an `init`."""
  files = sorted(pathlib.Path(__file__).parent.glob("*.py"))
  return [f.stem for f in files if "\ndef init(" in f.read_text("utf-8")]


def _part(spec, params, model, where):
  spec = dict(spec)
  name = spec.pop("type", None)
  if name not in formats():
    raise ValueError(
      f"config: {where}.type={name!r}: there are {', '.join(formats())}."
    )
  init = importlib.import_module(f"vlp_jax.interop.{name}").init
  names = inspect.signature(init).parameters
  for key in spec:
    if key not in names:
      given = [n for n in names if n not in ("abstract_params", "model")]
      raise ValueError(
        f"config: {where}.{key}: no such argument of type={name!r}; it has"
        f" {', '.join(given)}."
      )
  if "path" not in spec:
    raise ValueError(f"config: {where}.path is missing: name the file or directory.")
  # Formats whose files describe themselves compare that with the model.
  more = {"model": model} if "model" in names else {}
  return init(params, **spec, **more)
