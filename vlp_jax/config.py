"""What a run is: the top level of a config, with its defaults and its checks.

What a config may say is what the dataclasses say that it is handed to: `Run` for its
top level, and the class in vlp_jax/objectives/itc.py for `objectives.itc`. Defaults
live there alone. Files are read by config_file.py.
"""

from collections.abc import Mapping
import dataclasses
import math
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


def said(run: Run) -> dict[str, Any]:
  """A run as plain data, without what few runs have and this one has not (`UNSAID`)."""
  fields = {field.name: field for field in dataclasses.fields(Data)}
  empty = {name: _default(f) for name, f in fields.items() if f.metadata == UNSAID}
  whole = dataclasses.asdict(run)
  data = {k: v for k, v in whole["data"].items() if k not in empty or v != empty[k]}
  return whole | {"data": data}


def _default(field):
  if field.default is not dataclasses.MISSING:
    return field.default
  return field.default_factory()


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
