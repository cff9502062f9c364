"""A config as it is written: a Python file with overrides, and the text that is kept.

A config is a Python file whose `get_config(arg="")` returns plain data. What the data
mean is not known here, but to config.py.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping
import contextlib
import importlib.util
import inspect
import json
import pathlib
import re
import sys
import types
from typing import Any

import ml_collections

from vlp_jax import schema


def load(spec: str, overrides: Iterable[str] = ()) -> ml_collections.ConfigDict:
  """The config of "FILE[:arg]", with "--config.a.b=value" put over it.

  Args:
    spec: a .py file, executed where it lies, and the argument of its `get_config`; or
      the config.json of an earlier run.
    overrides: values are Python literals, and text where they are not. Keys that the
      file does not mention are added: `schema.check_fields` knows which exist.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: what it says is no config, or does not know the argument.
  """
  path, arg = _split(spec)
  if path.suffix == ".json":
    if arg:
      raise ValueError(
        f"config: {path}: a saved config takes no argument, got {arg!r}."
      )
    return saved(path.read_text("utf-8"), overrides)
  config = _execute(path, arg)
  for item in overrides:
    _override(config, item)
  return config


def saved(text: str, overrides: Iterable[str] = ()) -> ml_collections.ConfigDict:
  """The config that `to_json` wrote, with "--config.a.b=value" put over it."""
  config = from_json(text)
  for item in overrides:
    _override(config, item)
  return config


def _split(spec):
  """(path, arg) of "FILE[:arg]"."""
  if pathlib.Path(spec).is_file():
    return pathlib.Path(spec), ""
  name, _, arg = spec.partition(":")
  path = pathlib.Path(name)
  if not path.is_file():
    folder = path.parent
    files = sorted(p.name for p in folder.glob("*.py")) if folder.is_dir() else []
    near = schema.nearest(path.name, files) or schema.nearest(f"{path.name}.py", files)
    hint = f"; did you mean {folder / near}?" if near else "."
    there = f" ({folder}/ has: {', '.join(files)})" if files else ""
    raise FileNotFoundError(f"config: no such file: {path}{hint}{there}")
  return path, arg


def _execute(path, arg):
  with _importable(path):
    found = importlib.util.spec_from_file_location("_config_file", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    if not hasattr(module, "get_config"):
      raise ValueError(f'config: {path} has no function get_config(arg="").')
    if arg and not inspect.signature(module.get_config).parameters:
      raise ValueError(f"config: {path}: get_config() takes no argument, got {arg!r}.")
    config = _plain(module.get_config(arg) if arg else module.get_config(), path)
    # A file compares its argument with the names it knows: a wrong one changes nothing.
    if arg and flatten(config) == flatten(_plain(module.get_config(), path)):
      raise ValueError(
        f"config: {path}:{arg}: the argument {arg!r} changes nothing, so the file"
        " does not know it; its text says which it does."
      )
  return config


@contextlib.contextmanager
def _importable(path):
  """Lets the file say `from configs import parts`, and import its siblings.

  `configs` is the folder above `path`, then that of the working directory, then the one
  beside the package. What only this file could import is forgotten after it, so that
  another's sibling of the same name is not mistaken for it.
  """
  roots = [*path.resolve().parents, pathlib.Path.cwd(), schema.PACKAGE.parent]
  package = types.ModuleType("configs")
  package.__path__ = [str(r / "configs") for r in roots if (r / "configs").is_dir()]
  ours = lambda name: name == "configs" or name.startswith("configs.")
  kept = {name: sys.modules.pop(name) for name in list(sys.modules) if ours(name)}
  folder = path.resolve().parent
  known = folder in [pathlib.Path(entry).resolve() for entry in sys.path]
  before = set(sys.modules)
  sys.modules["configs"] = package
  sys.path.insert(0, str(folder))
  try:
    yield
  finally:
    sys.path.remove(str(folder))
    for name in filter(ours, list(sys.modules)):
      del sys.modules[name]
    if not known:
      for name in sys.modules.keys() - before:
        if _is_sibling(folder, name):
          del sys.modules[name]
    sys.modules.update(kept)


def _is_sibling(folder, name):
  """Whether a loaded module is a file or a package of the folder."""
  file = pathlib.Path(getattr(sys.modules[name], "__file__", None) or "").resolve()
  beside = folder / name.partition(".")[0]
  return file == beside.with_suffix(".py") or beside in file.parents


def _plain(value, path, where=""):
  """A ConfigDict of plain data, or an error that says where it is not plain."""
  if isinstance(value, Mapping | ml_collections.ConfigDict):
    config = ml_collections.ConfigDict()
    for key in value:
      inner = f"{where}.{key}".lstrip(".")
      if not isinstance(key, str) or not re.fullmatch(r"[^.=\s]+", key):
        raise ValueError(f"config: {path}: {inner}: {key!r} is no name for a key.")
      config[key] = _plain(value[key], path, inner)
    return config
  if not where:
    raise ValueError(
      f"config: {path}: get_config returned {value!r}, wants a ConfigDict."
    )
  if isinstance(value, list | tuple):
    for item in value:
      if isinstance(item, Mapping | ml_collections.ConfigDict):
        raise ValueError(
          f"config: {path}: {where}: a dict within a {type(value).__name__}: give it a"
          " name instead, so that it can be overridden."
        )
    return type(value)(_plain(item, path, where) for item in value)
  if value is None or type(value) in (bool, int, float, str):
    return value
  raise ValueError(
    f"config: {path}: {where}: got {value!r} ({type(value).__name__}), wants plain"
    " data: None, bool, int, float, str, tuple, list or dict."
  )


def _override(config, item):
  name, equals, text = item.partition("=")
  name = name.removeprefix("--").removeprefix("config.")
  if not equals or not name or not all(name.split(".")):
    raise ValueError(f"config: {item}: wants --config.key=value or --config.a.b=value.")
  *parents, last = name.split(".")
  for i, key in enumerate(parents):
    inner = config.get(key)
    if inner is None:
      with config.ignore_type():
        config[key] = ml_collections.ConfigDict()
      inner = config[key]
    if not isinstance(inner, ml_collections.ConfigDict):
      raise ValueError(
        f"config: --config.{name}: {'.'.join(parents[: i + 1])} is {inner!r}, which has"
        " no fields."
      )
    config = inner
  with config.ignore_type():
    config[last] = _plain(_literal(text), "command line", name)


def _literal(text):
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return text


# --- As text ---


def flatten(config: Mapping[str, Any] | ml_collections.ConfigDict) -> list[str]:
  """Sorted lines "a.b.c = value", for people and for golden files."""
  return sorted(f"{path} = {value!r}" for path, value in _leaves(config, ""))


def _leaves(value, where) -> Iterator[tuple[str, Any]]:
  if not isinstance(value, Mapping | ml_collections.ConfigDict):
    yield where, value
    return
  if where and not value:
    yield where, {}
  for key in value:
    yield from _leaves(value[key], f"{where}.{key}".lstrip("."))


def to_json(config: Mapping[str, Any] | ml_collections.ConfigDict) -> str:
  """The config as text that `from_json` reads back, tuples as tuples."""

  def mark(value):
    if isinstance(value, tuple):
      return {"tuple": [mark(item) for item in value]}
    if isinstance(value, list):
      return [mark(item) for item in value]
    if isinstance(value, Mapping | ml_collections.ConfigDict):
      return {key: mark(value[key]) for key in value}
    return value

  return json.dumps(mark(config), indent=2, ensure_ascii=False) + "\n"


def from_json(text: str) -> ml_collections.ConfigDict:
  """What `to_json` wrote.

  Raises:
    ValueError: the text is no saved config.
  """

  def unmark(pairs):
    found = dict(pairs)
    if list(found) == ["tuple"] and isinstance(found["tuple"], list):
      return tuple(found["tuple"])
    return found

  try:
    value = json.loads(text, object_pairs_hook=unmark)
  except json.JSONDecodeError as error:
    raise ValueError(f"config: not a saved config: {error}") from error
  return _plain(value, "saved config")
