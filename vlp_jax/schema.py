"""What configs may say: the types of a seam, and the fields of its classes.

The file is the registry, and the annotations of a dataclass are the schema.
"""

from collections.abc import Iterable, Mapping
import contextlib
import dataclasses
import difflib
import fractions
import importlib
import inspect
import pathlib
import re
import types
import typing
from typing import Annotated, Any, Literal

import ml_collections

# 300, "300 steps", "2 epochs", "1_000_000 examples" or "5%" (of the whole run).
Duration = Annotated[int | str, "duration"]

PACKAGE = pathlib.Path(__file__).parent

# What a file exports, by the folder it is in. Other folders export the module itself.
EXPORTS = {
  "data.sources": "Source",
  "data.tokenizers": "Tokenizer",
  "evaluators": "Evaluator",
  "models": "Encoder",
  "models.codebooks": "Codebook",
  "models.fusion": "Fusion",
  "objectives": "Objective",
}


def duration(value: Any) -> tuple[fractions.Fraction, str]:
  """(count, unit) of a duration; units are "step", "epoch", "example" and "%".

  Raises:
    ValueError: it is none.
  """
  if type(value) is int and value >= 0:
    return fractions.Fraction(value), "step"
  found = isinstance(value, str) and re.fullmatch(
    r"\s*(\d[\d_]*(?:\.\d+)?(?:e\d+)?)\s*(step|epoch|example|%)s?\s*", value
  )
  if not found or found[0].rstrip().endswith("%s"):
    raise ValueError(
      f"{value!r} is no duration: write 300, '300 steps', '2 epochs',"
      " '1_000_000 examples' or '5%'."
    )
  return fractions.Fraction(found[1].replace("_", "")), found[2]


def resolve(seam: str, type: str | None, *, where: str = "") -> Any:
  """What `type` names: a file of the seam's folder, or "my.module:Class" of anyone's.

  Args:
    seam: folder of the package, "objectives" or "data.sources".
    type: "itc" is the class `Objective` of vlp_jax/objectives/itc.py.
    where: path in the config, for messages.

  Raises:
    ValueError: there is none; names those that exist and the nearest.
  """
  at = f"config: {where or seam}"
  export = EXPORTS.get(seam)
  if not type or not isinstance(type, str):
    raise ValueError(
      f"{at}.type is missing: name a file of {folder(seam)}/, of {_list(kinds(seam))}."
    )
  if ":" in type:
    return _outside(type, at)
  if type not in kinds(seam):
    near = nearest(type, kinds(seam))
    raise ValueError(
      f"{at}: type={type!r}: no such file as {folder(seam)}/{type}.py"
      + (f" with a class {export}" if export else "")
      + (f"; did you mean {near!r}?" if near else ".")
      + f" (there are: {', '.join(kinds(seam))}; or 'my.module:Class')"
    )
  module = importlib.import_module(f"vlp_jax.{seam}.{type}")
  return getattr(module, export) if export else module


def kinds(seam: str) -> list[str]:
  """The types that a seam has: its files which define its class."""
  files = sorted((PACKAGE / seam.replace(".", "/")).glob("*.py"))
  names = [f.stem for f in files if not f.stem.startswith("_")]
  export = EXPORTS.get(seam)
  if export is None:
    return names
  has = re.compile(rf"^class {export}\b", re.MULTILINE)
  texts = {f.stem: f.read_text("utf-8") for f in files}
  return [name for name in names if has.search(texts[name])]


def _outside(type, at):
  module_name, _, name = type.partition(":")
  try:
    module = importlib.import_module(module_name)
  except ModuleNotFoundError as error:
    # A module that is there, but imports one that is not, says so itself.
    if not f"{module_name}.".startswith(f"{error.name}."):
      raise
    raise ValueError(
      f"{at}: type={type!r}: no module {error.name}: is its folder on PYTHONPATH?"
    ) from error
  if not hasattr(module, name):
    raise ValueError(f"{at}: type={type!r}: {module_name} has no {name!r}.")
  return getattr(module, name)


def fields(cls: type) -> dict[str, Any]:
  """Name -> annotation of what a config may say about `cls`, a dataclass.

  Flax's own `parent` and `name`, fields that are modules, and those with metadata
  {"internal": True} are the code's.
  """
  own = ("parent", "name") if _is_module(cls) else ()
  hints = {}
  for field in dataclasses.fields(cls):
    hint = field.type
    if isinstance(hint, str):
      hint = typing.get_type_hints(cls, include_extras=True)[field.name]
    inside = field.metadata.get("internal") or not field.init
    if field.name not in own and not inside and not _is_module(hint):
      hints[field.name] = hint
  return hints


def check_fields(
  cls: type,
  spec: Mapping[str, Any],
  where: str,
  *,
  given: Mapping[str, Any] | Iterable[str] = (),
) -> None:
  """Checks what a config says about `cls`: names, types, and that nothing is missing.

  Args:
    cls: a dataclass.
    spec: field -> value. Dataclasses within are dicts, and checked too.
    where: path of `spec` in the config, "" for the whole.
    given: names of the fields that the code hands in.

  Raises:
    ValueError: names the field, the file and the way out.
  """
  hints = fields(cls)
  for name, value in spec.items():
    path = f"{where}.{name}".lstrip(".")
    if name not in hints:
      near = nearest(name, hints)
      raise ValueError(
        f"config: {path}: no such field of {_place(cls)}; "
        + (f"did you mean {near!r}? " if near else "")
        + f"(fields: {', '.join(hints)})"
      )
    check_value(hints[name], value, path)
  for field in dataclasses.fields(cls):
    lacks = field.default is field.default_factory is dataclasses.MISSING
    if lacks and field.name in hints and field.name not in {*spec, *given}:
      path = f"{where}.{field.name}".lstrip(".")
      raise ValueError(
        f"config: {path} is missing: {_place(cls)} wants {_wants(hints[field.name])}."
      )


def check_value(hint: Any, value: Any, path: str) -> None:
  """Checks that a value is what an annotation says, by `path` in the message."""
  nested = dataclass_of(hint)
  if nested and isinstance(value, Mapping | ml_collections.ConfigDict):
    check_fields(nested, value, path)
  elif not _fits(value, hint):
    choices = [c for c in _choices(hint) if isinstance(c, str)]
    near = nearest(value, choices) if isinstance(value, str) else None
    way_out = f"; did you mean {near!r}?" if near else "."
    if isinstance(value, list) and _fits(tuple(value), hint):
      way_out = f": write {tuple(value)}."
    what = "wrong value" if choices and isinstance(value, str) else "wrong type"
    raise ValueError(
      f"config: {path}: {what}: got {value!r} ({type(value).__name__}), wants"
      f" {_wants(hint)}{way_out}"
    )


def is_duration(hint: Any) -> bool:
  """Whether a field's annotation is a Duration, or one that may be None."""
  if typing.get_origin(hint) is Annotated:
    return "duration" in hint.__metadata__
  return _is_union(hint) and any(map(is_duration, typing.get_args(hint)))


def _is_union(hint):
  return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _is_module(hint):
  """Whether it is a class of flax modules; flax is not imported to ask."""
  parents = inspect.getmro(hint) if isinstance(hint, type) else ()
  return any(
    (p.__module__, p.__name__) == ("flax.linen.module", "Module") for p in parents
  )


def dataclass_of(hint: Any) -> type | None:
  """The dataclass that an annotation names, perhaps beside None."""
  options = typing.get_args(hint) if _is_union(hint) else (hint,)
  found = [o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)]
  return found[0] if found else None


def _choices(hint):
  """All values of the Literals in an annotation."""
  if typing.get_origin(hint) is Literal:
    return typing.get_args(hint)
  parts = typing.get_args(hint) if _is_union(hint) else ()
  return tuple(choice for part in parts for choice in _choices(part))


def _fits(value, hint):
  """Whether `value` is one that a field with annotation `hint` takes."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if hint is Any:
    return True
  if is_duration(hint) and not _is_union(hint):
    with contextlib.suppress(ValueError):
      return bool(duration(value))
    return False
  if origin is Annotated:
    return _fits(value, args[0])
  if _is_union(hint):
    return any(_fits(value, option) for option in args)
  if origin is Literal:
    return any(value == choice and type(value) is type(choice) for choice in args)
  if hint is None or hint is types.NoneType:
    return value is None
  if hint in (bool, int, str):
    return type(value) is hint
  if hint is float:
    return type(value) in (int, float)
  kind = origin or hint
  if kind in (dict, Mapping) or (isinstance(kind, type) and issubclass(kind, Mapping)):
    if not isinstance(value, Mapping | ml_collections.ConfigDict):
      return False
    return not args or all(_fits(value[key], args[1]) for key in value)
  if kind is tuple and args:
    if not isinstance(value, tuple):
      return False
    wants = args[:1] * len(value) if args[1:] == (...,) else args
    return len(wants) == len(value) and all(map(_fits, value, wants))
  if kind is list and args:
    return isinstance(value, list) and all(_fits(item, args[0]) for item in value)
  return isinstance(value, kind) if isinstance(kind, type) else True


def _wants(hint):
  """An annotation in words."""
  if hint is Any:
    return "a value"
  if _is_union(hint):
    return " or ".join(_wants(option) for option in typing.get_args(hint))
  if typing.get_origin(hint) is Literal:
    return " or ".join(map(repr, typing.get_args(hint)))
  if is_duration(hint):
    return "a duration (300, '300 steps', '2 epochs', '1_000_000 examples', '5%')"
  if typing.get_origin(hint) is Annotated:
    return _wants(typing.get_args(hint)[0])
  if hint is types.NoneType:
    return "None"
  if typing.get_origin(hint) is None and isinstance(hint, type):
    return "dict" if dataclasses.is_dataclass(hint) else hint.__name__
  return str(hint)


def _place(cls):
  """Where a class stands, as one would open it."""
  package, _, rest = cls.__module__.partition(".")
  if package == "vlp_jax":
    return f"vlp_jax/{rest.replace('.', '/')}.py {cls.__name__}"
  return f"{cls.__module__}:{cls.__name__}"


def folder(seam: str) -> str:
  """The folder of a seam, from the root of the repository."""
  return f"vlp_jax/{seam.replace('.', '/')}"


def _list(names):
  return ", ".join(names) or "which there are none"


def nearest(name: str, names: Iterable[str]) -> str | None:
  """The one of `names` that `name` was perhaps meant to be."""
  found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
  return found[0] if found else None
