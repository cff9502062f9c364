"""Which formats of checkpoints there are, and which one a file is of.

The file is the registry: a format is a file of this folder that exports `init` (see
`initial.py`) and

  load(path, …)               a tree of our parameters, or a dataclass `Checkpoint` of
                              which `params`, `ema` and `memory` are such trees
  save(path, params, …)       or save(path, checkpoint, …): what `load` returns
  SIGNATURE                   patterns of whole names, of which a file of the format has
                              one tensor each; with "!" before it, none. A format
                              without is read when it is named
  of_model(model, params)     a Checkpoint, where the format holds towers of a model
"""

from collections.abc import Mapping, Sequence
import dataclasses
import difflib
import importlib
import inspect
import os
import pathlib
import re
import types
from typing import Any

from vlp_jax.interop import hf
from vlp_jax.interop import native
from vlp_jax.interop import reader

EXPORTS = ("\ndef init(", "\ndef load(", "\ndef save(")
SIGNATURE = re.compile(r"^SIGNATURE = ", re.MULTILINE)
NATIVE = "native"
# What a checkpoint of a run may have, and a format of parameters alone leaves out.
STATE = ("ema", "memory")


def names() -> list[str]:
  """All formats beside our own."""
  return [
    name
    for name, text in _files()
    if name != NATIVE and all(export in text for export in EXPORTS)
  ]


def find(path: str | os.PathLike, *, key: str | None = None) -> str:
  """The format of a file or directory, by the names of its tensors.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is of no format that is known by its names, or of several.
  """
  if (pathlib.Path(path) / native.FILE).is_file():
    return NATIVE
  if pathlib.Path(path).is_file():
    tensors = reader.load(path, key=key)
  else:
    tensors = hf.read(path).tensors
  known = [
    name for name, text in _files() if name in names() and SIGNATURE.search(text)
  ]
  fits = [n for n in known if matches(_module(n).SIGNATURE, tensors)]
  if len(fits) == 1:
    return fits[0]
  if not fits:
    first = ", ".join(list(tensors)[:6])
    raise ValueError(
      f"{path} is of no format that is known by its names ({', '.join(known)}); it has"
      f" {first} …: say --from with one of {', '.join(names())}."
    )
  raise ValueError(f"{path} may be of {' or '.join(fits)}: say which with --from.")


def matches(signature: Sequence[str], found: Mapping[str, Any]) -> bool:
  """Whether tensors of these names are of the format with this signature."""
  for pattern in signature:
    refused = pattern.startswith("!")
    wanted = re.compile(pattern.removeprefix("!"))
    if any(map(wanted.fullmatch, found)) == refused:
      return False
  return True


def load(
  path: str | os.PathLike,
  name: str | None = None,
  options: Mapping[str, Any] = types.MappingProxyType({}),
) -> native.Checkpoint:
  """A checkpoint of any format, in our trees.

  Args:
    path: file, directory, folder of our own, or name of the hub.
    name: the format; None: found from the names.
    options: arguments of its `load`, such as the number of heads.

  Raises:
    FileNotFoundError, ValueError: see `find` and the format's `load`.
  """
  name = name or find(path, key=options.get("key"))
  if name == NATIVE:
    return native.load(path)
  module = _module(name)
  _check(module.load, options, name)
  return native.Checkpoint(name, _fields(module.load(path, **options)))


def towers() -> list[str]:
  """Formats that hold a tower of a model: they export `of_model(model, params)`."""
  return [
    name for name, text in _files() if "\ndef of_model(" in text and name in names()
  ]


def of_model(name: str, model: Any, params: Mapping[str, Any]) -> native.Checkpoint:
  """The tower of a trained model in one of the formats `towers`.

  Args:
    name: the format. model: the VLM. params: its pretrainer's.

  Raises:
    ValueError: the tower is of another kind.
  """
  return native.Checkpoint(name, _fields(_module(name).of_model(model, params)))


def save(
  path: str | os.PathLike,
  checkpoint: native.Checkpoint,
  name: str,
  options: Mapping[str, Any] = types.MappingProxyType({}),
) -> list[str]:
  """Writes what `load` gave in a format of others, or in our own.

  Args:
    path: which is not there yet.
    checkpoint: of `load`, or of a run, whose format is None.
    name: the format. options: arguments of its `save`.

  Returns:
    What the checkpoint has and the format has no place for: averages, queues.

  Raises:
    ValueError: the format has no such parts, or the trees do not fit it.
  """
  if name == NATIVE:
    if options:
      raise ValueError(f"{path}: our own layout has no option {next(iter(options))!r}.")
    native.save(path, checkpoint)
    return []
  module = _module(name)
  _check(module.save, options, name)
  if pathlib.Path(path).exists():
    raise ValueError(f"{path} is there already: name another.")
  plain = "params" in inspect.signature(module.save).parameters
  given = {k: v for k, v in checkpoint.fields.items() if k == "params"}
  missing = [] if given else ["params"]
  if not plain:
    own = {field.name: field for field in dataclasses.fields(module.Checkpoint)}
    given = {k: v for k, v in checkpoint.fields.items() if k in own}
    missing = [k for k, field in own.items() if k not in given and _is_needed(field)]
  left = [k for k, v in checkpoint.fields.items() if v and k not in given]
  if missing or set(left) - set(STATE):
    raise ValueError(
      f"--to {name}: a checkpoint of {checkpoint.format or 'a run'} has"
      f" {', '.join(checkpoint.fields)}, but {name} wants"
      f" {', '.join([*given, *missing])}."
    )
  module.save(path, given["params"] if plain else module.Checkpoint(**given), **options)
  return left


def _is_needed(field):
  return field.default is field.default_factory is dataclasses.MISSING


def _fields(loaded):
  """{"params": tree, …} of what a format's `load` returns."""
  if isinstance(loaded, Mapping):
    return {"params": loaded}
  return {f.name: getattr(loaded, f.name) for f in dataclasses.fields(loaded)}


def _files():
  """(name, text) of the files of this folder."""
  files = sorted(pathlib.Path(__file__).parent.glob("*.py"))
  return [(f.stem, f.read_text("utf-8")) for f in files]


def _module(name):
  if name not in names():
    near = difflib.get_close_matches(name, names(), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"no format {name!r}: there are {', '.join(names())}.{hint}")
  return importlib.import_module(f"vlp_jax.interop.{name}")


def _check(function, options, name):
  """The options are arguments of the format's function."""
  given = list(inspect.signature(function).parameters)
  allowed = [n for n in given if n not in ("path", "checkpoint", "params")]
  wrong = [n for n in options if n not in allowed]
  if wrong:
    raise ValueError(
      f"{name}: no option {wrong[0]!r}; it has {', '.join(allowed) or 'none'}."
    )
