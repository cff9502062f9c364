"""The data of a run: of one kind, or of several that steps read in turns."""

from collections.abc import Mapping
import dataclasses
from typing import Any
import zlib

from vlp_jax import config as config_lib
from vlp_jax import schema
from vlp_jax.data import columns as columns_lib
from vlp_jax.data import turns as turns_lib
from vlp_jax.training import sharding as sharding_lib

# What examples of a kind have, for the READS of objectives.
HAS = {"pairs": ("image", "text"), "images": ("image",), "texts": ("text",)}


@dataclasses.dataclass(frozen=True)
class Feed:
  """Data of one kind.

  Attributes:
    source, pp, holds, block, batch_size: see `config.Data` and `config.Kind`.
    columns: what its objectives want beside images and texts.
    seed: of its order and augmentation.
  """

  source: Any
  pp: str
  holds: config_lib.Holds
  block: int
  batch_size: int
  columns: columns_lib.Columns
  seed: int

  def batches(self, job: Any, rows: Mapping[str, Any], *, start: int) -> Any:
    """Endless batches from position `start` on; of each, `rows` of `job.rows`."""
    # Here: what a step is made of is built where TensorFlow is not installed, too.
    from vlp_jax.data import pipeline

    data = job.config.data
    return pipeline.train_batches(
      self.source,
      self.pp,
      job.tokenizer,
      batch_size=self.batch_size,
      seed=self.seed,
      start=start,
      **rows,
      max_bad=data.max_bad,
      workers=data.workers,
      block=self.block,
      columns=self.columns,
      holds=self.holds,
    )


def feeds(
  config: config_lib.Run, sources: Mapping[str, Any], pretrainer: Any
) -> dict[str, Feed]:
  """The data of each kind, the run's own ("pairs") first.

  Args:
    config: of the run. sources: {kind: source}; none is wanted for shapes alone.
    pretrainer: whose objectives name the kinds they are for.

  Raises:
    ValueError: an objective is for no kind that there is, or reads what its kind does
      not have; or a kind is for nothing.
  """
  data, own = config.data, config_lib.PAIRS
  kinds = {own: data} | {n: config_lib.Kind(**spec) for n, spec in data.kinds.items()}
  _check(config, kinds, pretrainer)
  made = {}
  for name, kind in kinds.items():
    objectives = {
      key: objective
      for key, objective in pretrainer.objectives.items()
      if name in pretrainer.kinds.get(key, own).split("+")
    }
    size = config.batch_size if name == own else kind.batch_size or config.batch_size
    made[name] = Feed(
      source=sources.get(name),
      pp=kind.pp,
      holds=kind.holds,
      block=kind.block,
      batch_size=size,
      columns=columns_lib.of(objectives, res=pretrainer.model.image.res),
      # Two kinds of one source come in orders that have nothing to do with each other.
      seed=config.seed + (0 if name == own else zlib.crc32(name.encode())),
    )
  return made


def turns(config: config_lib.Run) -> turns_lib.Turns | None:
  """In which turns the kinds are read; None where there is one kind alone.

  Raises:
    ValueError: they name a kind that there is not, or leave one out.
  """
  data = config.data
  if not data.kinds:
    if data.turns:
      raise ValueError(
        f"config: data.turns={data.turns}, but there is one kind of data: name others"
        " in data.kinds."
      )
    return None
  kinds = (config_lib.PAIRS, *data.kinds)
  made = turns_lib.Turns(data.turns or kinds, data.drawn, config.seed)
  for name in made.kinds:
    if name not in kinds:
      near = schema.nearest(name, kinds)
      raise ValueError(
        f"config: data.turns names {name!r}; "
        + (f"did you mean {near!r}? " if near else "")
        + f"(kinds: {', '.join(kinds)})"
      )
  for name in kinds:
    if name not in made.kinds:
      raise ValueError(
        f"config: data.turns={data.turns} never reads {name!r}: name it there, or set"
        f" data.kinds.{name}=None."
      )
  return made


def batches(job: Any, rows: Mapping[str, Any], *, position: int) -> Any:
  """This process's rows of the batches of a run (`job.Job`) from a position on.

  Args:
    rows: of `job.rows`, where there is one kind of data.
    position: batch_size times the steps whose data the run has seen or passed over.

  Returns:
    An iterator of batches, or of {kind: batch} where there are several kinds, with
    `close` and `bad` as of `pipeline.TrainBatches`.
  """
  if job.turns is None:
    return job.feeds[config_lib.PAIRS].batches(job, rows, start=position)
  step = position // job.config.batch_size
  seen = job.turns.seen(step)
  made = {
    name: feed.batches(
      job,
      dict(rows=sharding_lib.local_rows(feed.batch_size, job.mesh)),
      start=seen[name] * feed.batch_size,
    )
    for name, feed in job.feeds.items()
  }
  return turns_lib.TurnBatches(job.turns, made, step)


def _check(config, kinds, pretrainer):
  own = config_lib.PAIRS
  if own in config.data.kinds:
    raise ValueError(
      f"config: data.kinds.{own}: this is the name of the run's own data, data.source:"
      " give the other another."
    )
  used = set()
  for name, objective in pretrainer.objectives.items():
    # An objective that reads less than image and text says so in READS.
    reads = objective.READS if hasattr(objective, "READS") else HAS["pairs"]
    for kind in pretrainer.kinds.get(name, own).split("+"):
      used.add(kind)
      _check_kind(f"config: objectives.{name}", kind, reads, kinds)
  for name in kinds:
    if name not in used:
      raise ValueError(
        f"config: data.kinds.{name}: no objective is for it: say"
        f" objectives.NAME.kind={name!r}, or leave the data out."
        if name != own
        else "config: data: no objective is for the run's own data (kind 'pairs'): name"
        " one, or make one of data.kinds the run's own."
      )


def _check_kind(where, kind, reads, kinds):
  """That there is such data, and that it has what the objective reads."""
  if kind not in kinds:
    near = schema.nearest(kind, kinds)
    raise ValueError(
      f"{where}.kind={kind!r}: no such kind of data; "
      + (f"did you mean {near!r}? " if near else "")
      + f"(kinds: {', '.join(kinds)})"
    )
  if [part for part in reads if part not in HAS[kinds[kind].holds]]:
    raise ValueError(
      f"{where} reads {' and '.join(reads)}, but its data, kind {kind!r}, holds"
      f" {kinds[kind].holds}: say {where.removeprefix('config: ')}.kind=…, one of"
      f" {', '.join(kinds)}."
    )
