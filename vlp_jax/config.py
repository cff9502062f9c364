"""Configs: read, overridden, checked, saved.

A config is a Python file whose `get_config(arg="")` returns plain data. What it may say
is what the dataclasses say that it is handed to: `Run` for its top level, and the class
in vlp_jax/objectives/itc.py for `objectives.itc`. Defaults live there alone.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping
import contextlib
import dataclasses
import fractions
import importlib.util
import inspect
import json
import math
import pathlib
import re
import sys
import types
from typing import Any, Literal

import ml_collections

from vlp_jax import schema

Holds = Literal["pairs", "images", "texts"]
PAIRS = "pairs"  # the kind of the run's own data, beside `Data.kinds`
# Of fields that texts of a config leave out where they are as by default.
UNSAID = {"unsaid": True}


@dataclasses.dataclass(frozen=True)
class Kind:
  """Data of another kind beside the run's own, for objectives that name it.

  Attributes:
    source, pp, block: as of `Data`; a source without a type is the run's own, but for
      what it says.
    holds: what its examples have; pp of "texts" has words on captions alone.
    batch_size: examples of a step that reads them; None: the run's.
  """

  source: dict
  pp: str
  holds: Holds = "pairs"
  block: int = 1
  batch_size: int | None = None


@dataclasses.dataclass(frozen=True)
class Data:
  """What is trained on.

  Attributes:
    source: dict(type=…, …), a file of data/sources/.
    pp: the words of preprocessing, "decode|resize(64)|…".
    max_bad: share of broken records beyond which the run stops.
    workers: threads that read and decode; None: by the number of cores.
    block: so many examples that lie side by side in the source stay together in the
      order of training, as rivals that a batch shall tell apart (GRIT-VLP,
      arXiv:2208.04060); divides their number.
    holds: what its examples have: images and texts, or one of them alone.
    kinds: {name: fields of `Kind`}, data of other kinds; the run's own is "pairs".
      An objective says `kind=name`, where it is not for the pairs.
    turns: the kinds that steps read, in their turn: ("pairs", "images") alternates,
      ("pairs+images",) reads both in every step. See data/turns.py.
    drawn: each time round, the turns come in another order.
  """

  source: dict
  pp: str
  max_bad: float = 0.01
  workers: int | None = None
  block: int = 1
  holds: Holds = dataclasses.field(default="pairs", metadata=UNSAID)
  kinds: dict = dataclasses.field(default_factory=dict, metadata=UNSAID)
  turns: tuple[str, ...] = dataclasses.field(default=(), metadata=UNSAID)
  drawn: bool = dataclasses.field(default=False, metadata=UNSAID)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """When the state is saved, and what is kept.

  Attributes:
    every: between saves; the last step is always saved.
    keep: this many of the newest.
    best: a metric ("val/t2i_r1"); the checkpoint where it was largest is kept too.
  """

  every: schema.Duration = "10%"
  keep: int = 2
  best: str | None = None


@dataclasses.dataclass(frozen=True)
class Log:
  """What is written while training.

  Attributes:
    every: between lines of the log.
    tensorboard: writes event files beside metrics.jsonl.
  """

  every: schema.Duration = 50
  tensorboard: bool = True


@dataclasses.dataclass(frozen=True)
class Profile:
  """Records a trace of steps start … start + steps - 1."""

  start: schema.Duration = 20
  steps: int = 5


@dataclasses.dataclass(frozen=True)
class Run:
  """The top level of a config.

  Attributes:
    batch_size: examples a step, over all devices.
    accumulate: microbatches that a step is computed in, which need less memory and give
      the same step (`training/accumulate.py`).
    accumulate_stream: the microbatches' images come from the host one by one, so that
      the devices never hold those of the whole batch; else they come at once.
    total: length of the run.
    tokenizer, model, objectives, evals: components; see `build`. An objective or an
      evaluation that is set to None is left out. Beside its fields an objective has a
      weight in the loss, and may have a share: of those with one, each step has one
      alone, drawn by their shares from (seed, step).
    data, checkpoint, log, profile: see the classes; no profile: None.
    optim, sharding, guard, preemption: fields of training/optim.py, sharding.py,
      guard.py and preemption.py.
    ema_decay: of the teacher's parameters; None: no teacher.
    init: checkpoint to start from, dict(type=…, path=…).
    seed: of everything random.
  """

  batch_size: int
  total: schema.Duration
  tokenizer: dict
  model: dict
  objectives: dict
  data: Data
  optim: dict
  evals: dict = dataclasses.field(default_factory=dict)
  sharding: dict = dataclasses.field(default_factory=dict)
  guard: dict = dataclasses.field(default_factory=dict)
  preemption: dict = dataclasses.field(default_factory=dict)
  ema_decay: float | None = None
  checkpoint: Checkpoint = Checkpoint()
  log: Log = Log()
  profile: Profile | None = None
  init: dict | None = None
  seed: int = 0
  accumulate: int = 1
  accumulate_stream: bool = False

  def __post_init__(self):
    _bounds("batch_size", self.batch_size, 1)
    _bounds("seed", self.seed, 0)
    _bounds("accumulate", self.accumulate, 1)
    if self.accumulate_stream and self.accumulate == 1:
      raise ValueError(
        "config: accumulate_stream=True streams microbatches, but accumulate=1 makes"
        " none: say how many, e.g. accumulate=16."
      )
    _bounds("checkpoint.keep", self.checkpoint.keep, 1)
    _bounds("data.max_bad", self.data.max_bad, 0, 1)
    if self.ema_decay is not None:
      _bounds("ema_decay", self.ema_decay, 0, 1)


def _bounds(where, value, low, high=math.inf):
  if not low <= value <= high:
    wants = f"{low} or more" if high == math.inf else f"between {low} and {high}"
    raise ValueError(f"config: {where}={value}: wants {wants}.")


# --- Reading ---


def load(spec: str, overrides: Iterable[str] = ()) -> ml_collections.ConfigDict:
  """The config of "FILE[:arg]", with "--config.a.b=value" put over it.

  Args:
    spec: a .py file, executed where it lies, and the argument of its `get_config`; or
      the config.json of an earlier run.
    overrides: values are Python literals, and text where they are not. Keys that the
      file does not mention are added: `check_fields` knows which exist.

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
  beside the package.
  """
  roots = [*path.resolve().parents, pathlib.Path.cwd(), schema.PACKAGE.parent]
  package = types.ModuleType("configs")
  package.__path__ = [str(r / "configs") for r in roots if (r / "configs").is_dir()]
  ours = lambda name: name == "configs" or name.startswith("configs.")
  kept = {name: sys.modules.pop(name) for name in list(sys.modules) if ours(name)}
  folder = str(path.resolve().parent)
  sys.modules["configs"] = package
  sys.path.insert(0, folder)
  try:
    yield
  finally:
    sys.path.remove(folder)
    for name in filter(ours, list(sys.modules)):
      del sys.modules[name]
    sys.modules.update(kept)


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


# --- Durations ---


def steps(
  duration: schema.Duration, *, batch_size: int, epoch_size: int, total_steps: int
) -> int:
  """The number of steps, to the nearest, and at least 1 of a duration that is not 0.

  Args:
    duration: 300, "300 steps", "2 epochs", "1_000_000 examples" or "5%".
    batch_size: examples a step. epoch_size: examples an epoch.
    total_steps: what a percentage is of; 0 where that is not known.
  """
  count, unit = schema.duration(duration)
  if unit == "%" and not total_steps:
    raise ValueError(f"config: total={duration!r}: wants steps, epochs or examples.")
  per_unit = {
    "step": fractions.Fraction(1),
    "epoch": fractions.Fraction(epoch_size, batch_size),
    "example": fractions.Fraction(1, batch_size),
    "%": fractions.Fraction(total_steps, 100),
  }
  exact = count * per_unit[unit]
  return max(1, math.floor(exact + fractions.Fraction(1, 2))) if exact else 0


# --- The run ---


def run(config: Mapping[str, Any] | ml_collections.ConfigDict) -> Run:
  """The run that a config describes, with all defaults of the top level.

  Components stay dicts, which `build` and `check` look into.

  Raises:
    ValueError: an unknown, missing or mistyped key of the top level.
  """
  plain = _to_dict(config)
  schema.check_fields(Run, plain, "")
  for name in ("objectives", "evals"):
    members = plain.get(name, {})
    plain[name] = {key: spec for key, spec in members.items() if spec is not None}
  kinds = plain["data"].get("kinds", {})
  for spec in plain["evals"].values():
    _inherit(spec, plain["data"].get("source"))
  for spec in kinds.values():
    _inherit({"data": spec}, plain["data"].get("source"))
  return _instance(Run, plain)


def _inherit(spec, source):
  """An evaluation whose source names no type reads the training one, but for what it
  says: another split, say. So a folder is named once."""
  data = spec.get("data") if isinstance(spec, dict) else None
  own = data.get("source") if isinstance(data, dict) else None
  if isinstance(own, dict) and isinstance(source, dict) and "type" not in own:
    data["source"] = source | own


def _instance(cls, values):
  hints = schema.fields(cls)
  for name, value in values.items():
    nested = schema.dataclass_of(hints[name])
    if nested and isinstance(value, dict):
      values = values | {name: _instance(nested, value)}
  return cls(**values)


def _to_dict(value):
  """Plain dicts all the way down."""
  if isinstance(value, Mapping | ml_collections.ConfigDict):
    return {key: _to_dict(value[key]) for key in value}
  return value


@dataclasses.dataclass(frozen=True)
class _Part:
  """Where a component stands in a config.

  Attributes:
    path: keys; "*" is any. seam: its folder; "": it has one type only.
    default: its type where it names none; "*": the key it stands under.
    given: fields that `build` hands in. extra: keys that are the trainer's, and what
      they are.
  """

  path: str
  seam: str
  default: str | None = None
  given: tuple[str, ...] = ()
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


TOWERS = {"image": dict | None, "text": dict | None, "fusion": dict | None}
OBJECTIVE = {"weight": float, "share": float, "kind": str}
EVAL = {"every": schema.Duration, "data": dict | None, "batch_size": int}
PARTS = (
  _Part("model", "", "vlp_jax.models.vlm:VLM", given=TOWERS, extra=TOWERS),
  _Part("tokenizer", "data.tokenizers", given=("path",), extra={"train": dict | None}),
  _Part("data.source", "data.sources"),
  _Part("data.kinds.*", "", "vlp_jax.config:Kind"),
  _Part("data.kinds.*.source", "data.sources"),
  _Part("model.image", "models", "vit"),
  _Part("model.text", "models", "text", given=("vocab", "length")),
  _Part(
    "model.fusion",
    "models.fusion",
    given=("num_heads", "mlp_dim", "image_width", "text_width"),
  ),
  _Part("model.codebook", "models.codebooks"),
  _Part("objectives.*", "objectives", "*", ("vocab", "width"), OBJECTIVE),
  _Part("evals.*", "evaluators", "*", extra=EVAL),
  _Part("evals.*.data.source", "data.sources"),
  _Part("optim", "", "vlp_jax.training.optim:Optim"),
  _Part("sharding", "", "vlp_jax.training.sharding:Sharding"),
  _Part("guard", "", "vlp_jax.training.guard:Guard"),
  _Part("preemption", "", "vlp_jax.training.preemption:Preemption"),
)


def check(config: Run) -> None:
  """Checks every component of a run before anything is built or compiled.

  Raises:
    ValueError: the first type or field that does not exist, has the wrong type or is
      missing, with its path in the config.
  """
  whole = dataclasses.asdict(config)
  for part in PARTS:
    for where, spec in _at(whole, part.path.split("."), ""):
      if not isinstance(spec, dict):
        raise ValueError(
          f"config: {where}: wrong type: got {spec!r} ({type(spec).__name__}), wants a"
          " dict of fields."
        )
      for key in part.extra.keys() & spec.keys():
        schema.check_value(part.extra[key], spec[key], f"{where}.{key}")
      spec = {k: v for k, v in spec.items() if k not in part.extra}
      name = where.rpartition(".")[2] if part.default == "*" else part.default
      if part.seam:
        name = spec.pop("type", name)
      cls = schema.resolve(part.seam, name, where=where)
      schema.check_fields(cls, spec, where, given=part.given)


def _at(value, keys, where):
  """(path, component) for all that `keys` lead to and that is not None."""
  if value is None:
    return
  if not keys:
    yield where, value
    return
  if isinstance(value, dict):
    names = list(value) if keys[0] == "*" else [keys[0]] if keys[0] in value else []
    for name in names:
      yield from _at(value[name], keys[1:], f"{where}.{name}".lstrip("."))


# --- Saving ---


def flatten(config: Mapping[str, Any] | ml_collections.ConfigDict | Run) -> list[str]:
  """Sorted lines "a.b.c = value", for people and for golden files."""
  if isinstance(config, Run):
    config = dataclasses.asdict(config) | {"data": _said(config.data)}
  return sorted(f"{path} = {value!r}" for path, value in _leaves(_to_dict(config), ""))


def _said(data):
  """The fields of `Data`, but for what few runs have and this one has not."""
  fields = {field.name: field for field in dataclasses.fields(data)}
  empty = {name: _default(f) for name, f in fields.items() if f.metadata == UNSAID}
  whole = dataclasses.asdict(data)
  return {k: v for k, v in whole.items() if k not in empty or v != empty[k]}


def _default(field):
  if field.default is not dataclasses.MISSING:
    return field.default
  return field.default_factory()


def _leaves(value, where) -> Iterator[tuple[str, Any]]:
  if isinstance(value, dict) and (value or not where):
    for key, inner in value.items():
      yield from _leaves(inner, f"{where}.{key}".lstrip("."))
  else:
    yield where, value


def to_json(config: Mapping[str, Any] | ml_collections.ConfigDict | Run) -> str:
  """The config as text that `from_json` reads back, tuples as tuples."""
  if isinstance(config, Run):
    config = dataclasses.asdict(config)

  def mark(value):
    if isinstance(value, tuple):
      return {"tuple": [mark(item) for item in value]}
    if isinstance(value, list):
      return [mark(item) for item in value]
    if isinstance(value, dict):
      return {key: mark(inner) for key, inner in value.items()}
    return value

  return json.dumps(mark(_to_dict(config)), indent=2, ensure_ascii=False) + "\n"


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
