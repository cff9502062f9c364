"""From a config to what it names: data, tokenizer, model, optimiser, evaluators."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import inspect
import itertools
import pathlib
import re
import tempfile
import types
from typing import Any

from etils import epath
import jax
import numpy as np
import optax

from vlp_jax import clock as clock_lib
from vlp_jax import config as config_lib
from vlp_jax import feeds as feeds_lib
from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax import schema
from vlp_jax.data import columns as columns_lib
from vlp_jax.data import pp
from vlp_jax.data import turns as turns_lib
from vlp_jax.data.tokenizers import sentencepiece
from vlp_jax.models import vlm
from vlp_jax.training import accumulate
from vlp_jax.training import distributed
from vlp_jax.training import guard as guard_lib
from vlp_jax.training import microbatch
from vlp_jax.training import optim as optim_lib
from vlp_jax.training import preemption as preemption_lib
from vlp_jax.training import sharding as sharding_lib
from vlp_jax.training import step as step_lib
from vlp_jax.training import stepping as stepping_lib

# Fields of the whole model that its towers share, unless they name their own.
SHARED = ("backend", "dtype", "remat", "unroll")
TOWERS = ("image", "text", "fusion", "decoder", "codebook")


def component(
  seam: str,
  spec: Mapping[str, Any],
  where: str,
  *,
  default: str | None = None,
  given: Mapping[str, Any] | None = None,
  time: clock_lib.Clock | None = None,
) -> Any:
  """An instance of the class that `spec["type"]` names, with the fields of `spec`.

  Args:
    seam: folder of the package, e.g. "objectives" or "data.sources".
    spec: `dict(type=…, field=…)` of a config.
    where: path of `spec` in the config, for messages.
    default: the type where the spec names none.
    given: values for fields that the config does not repeat (vocabulary, widths);
      those that the class does not have are left out, those of the spec win.
    time: resolves fields that are durations into steps.
  """
  spec = dict(spec)
  cls = schema.resolve(seam, spec.pop("type", default), where=where)
  schema.check_fields(cls, spec, where, given=given or {})
  fields = schema.fields(cls)
  merged = {k: v for k, v in (given or {}).items() if k in fields} | spec
  for name, value in merged.items():
    if schema.is_duration(fields[name]) and time is not None:
      merged[name] = time.steps(value)
  return cls(**merged)


def source(spec: Mapping[str, Any], where: str = "data.source") -> Any:
  """The source of examples that the config names."""
  return component("data.sources", spec, where)


def tokenizer(spec: Mapping[str, Any], source: Any, workdir: epath.Path) -> Any:
  """The tokenizer that the config names; its vocabulary comes before any model.

  With `train=dict(vocab_size=…, model_type=…)` it is a SentencePiece model made of the
  captions of the training source, once, and kept in the workdir.
  """
  spec = dict(spec)
  recipe = spec.pop("train", None)
  if recipe is not None:
    if spec.get("path") or spec.get("type") != "sentencepiece":
      raise ValueError(
        "config: tokenizer.train makes a vocabulary of the captions: say type="
        '"sentencepiece" and no path with it.'
      )
    spec["path"] = str(_trained_tokenizer(source, workdir, recipe))
  return component("data.tokenizers", spec, "tokenizer")


def _trained_tokenizer(source, workdir, recipe):
  """The file of it on a disk; made, where the workdir has none."""
  kept = workdir / "tokenizer.model"
  remote = "://" in str(kept)
  scratch = tempfile.mkdtemp(prefix="vlp_jax") if remote else workdir
  path = pathlib.Path(scratch, kept.name)

  def make():
    if remote and kept.exists():
      path.write_bytes(kept.read_bytes())
      return
    captions = source.captions(np.arange(len(source)))
    sentencepiece.train(captions, path, **recipe)
    if remote:
      kept.write_bytes(path.read_bytes())

  distributed.made_once(path, make)
  return path


def model(spec: Mapping[str, Any], *, vocab: Any, length: int) -> vlm.VLM:
  """The model: an image tower, a text tower, and what fuses them.

  Args:
    spec: `config.model`.
    vocab: the tokenizer's vocabulary.
    length: the tokenizer's length, of which the position table gets as many rows
      unless the config asks for more.
  """
  spec = dict(spec)
  shared = {key: spec[key] for key in SHARED if key in spec}
  towers = {key: dict(spec.pop(key)) for key in TOWERS if spec.get(key)}
  for name in TOWERS:
    spec.pop(name, None)
  for name in ("image", "text"):
    if name not in towers:
      raise ValueError(f"config: model.{name} is missing: name an encoder.")
  image = component(
    "models", towers["image"], "model.image", default="vit", given=shared
  )
  words = shared | dict(vocab=vocab, length=length)
  text = component("models", towers["text"], "model.text", default="text", given=words)
  fusion = None
  if "fusion" in towers:
    sizes = shared | dict(num_heads=text.num_heads, mlp_dim=text.mlp_dim)
    sizes["image_width"] = image.width
    sizes["text_width"] = text.width
    fusion = component("models.fusion", towers["fusion"], "model.fusion", given=sizes)
  built = dict(image=image, text=text, fusion=fusion)
  if "decoder" in towers:
    built["decoder"] = component(
      "models", towers["decoder"], "model.decoder", default="text", given=words
    )
  if "codebook" in towers:
    built["codebook"] = component(
      "models.codebooks", towers["codebook"], "model.codebook", given=shared
    )
  schema.check_fields(vlm.VLM, spec, "model", given=built)
  return vlm.VLM(**built, **spec)


def pretrainer(
  config: config_lib.Run, *, vocab: Any, length: int, time: clock_lib.Clock
) -> pretrainer_lib.Pretrainer:
  """Model and objectives of a run.

  Args:
    config: the run's.
    vocab, length: of the tokenizer.
    time: for the durations that objectives have.
  """
  built = model(config.model, vocab=vocab, length=length)
  width = pooled_width = built.text.width
  if built.fusion is not None:
    width, pooled_width = built.fusion.widths(width)
  objectives, weights, shares, kinds = {}, {}, {}, {}
  for name, spec in config.objectives.items():
    spec = dict(spec)
    weights[name] = float(spec.pop("weight", 1.0))
    if "share" in spec:
      shares[name] = _share(spec.pop("share"), name)
    if "kind" in spec:
      kinds[name] = spec.pop("kind")
    objectives[name] = component(
      "objectives",
      spec,
      f"objectives.{name}",
      default=name,
      given=dict(vocab=vocab, width=width, pooled_width=pooled_width),
      time=time,
    )
    _check_teacher(name, spec, config.ema_decay)
  if not objectives:
    raise ValueError("config: objectives is empty: name at least one, e.g. itc.")
  return pretrainer_lib.Pretrainer(
    built, objectives, weights, shares=shares, kinds=kinds
  )


def _share(share, name):
  if not share > 0:
    raise ValueError(
      f"config: objectives.{name}.share={share}: want more than 0; to leave the"
      f" objective out, say objectives.{name}=None."
    )
  return float(share)


def _check_teacher(name, spec, ema_decay):
  """Fields that want a teacher, where the run has none."""
  wanted = [field for field in ("queue", "distill") if spec.get(field)]
  if wanted and ema_decay is None:
    raise ValueError(
      f"config: objectives.{name}.{wanted[0]} wants a teacher: set ema_decay, e.g."
      " 0.995."
    )


@dataclasses.dataclass(frozen=True)
class Job:
  """All that a run is made of, before anything is computed.

  Attributes:
    config: checked. workdir: where the run keeps everything.
    source, tokenizer: of the training data; None where only shapes are asked for.
    time: turns durations into steps.
    pretrainer: model and objectives.
    mesh, sharding: where arrays live.
    tx, schedule: the optimiser and its learning rate.
    guard, preemption: what is done about bad steps, and about notices to stop.
    batch: ShapeDtypeStructs of a global batch; of several kinds of data, {kind: those}.
    feeds: {kind: data}. turns: the kinds that each step reads; None: there is one.
  """

  config: config_lib.Run
  workdir: epath.Path | None
  source: Any
  tokenizer: Any
  time: clock_lib.Clock
  pretrainer: pretrainer_lib.Pretrainer
  mesh: jax.sharding.Mesh
  sharding: sharding_lib.Sharding
  tx: optax.GradientTransformation
  schedule: Callable
  guard: guard_lib.Guard
  preemption: preemption_lib.Preemption
  batch: dict[str, Any]
  feeds: dict[str, feeds_lib.Feed]
  turns: turns_lib.Turns | None = None

  @property
  def has_teacher(self) -> bool:
    return self.config.ema_decay is not None

  @functools.cached_property
  def abstract_state(self) -> step_lib.TrainState:
    """Shapes and places of the train state: no memory, no computation."""
    return step_lib.abstract_state(
      self.pretrainer,
      self.tx,
      self.batch,
      ema=self.has_teacher,
      mesh=self.mesh,
      sharding=self.sharding,
    )

  @property
  def layout(self) -> microbatch.Layout:
    """The microbatches of a step.

    Raises:
      ValueError: `config.accumulate` cannot be had.
    """
    return microbatch.layout(
      self.pretrainer.objectives,
      batch_size=self.config.batch_size,
      count=self.config.accumulate,
      parts=sharding_lib.batch_parts(self.mesh),
      lanes=sharding_lib.lanes(self.mesh, self.sharding),
    )


def stepping(job: Job) -> stepping_lib.Whole | stepping_lib.Streamed:
  """The train step, as the run takes it."""
  given = (job.pretrainer, job.tx)
  how = dict(
    seed=job.config.seed, ema_decay=job.config.ema_decay, schedule=job.schedule
  )
  where = (job.abstract_state, job.batch, job.mesh)
  judged = functools.partial(guard_lib.guarded, guard=job.guard, schedule=job.schedule)
  if job.config.accumulate == 1:
    return stepping_lib.Whole(judged(step_lib.make_train_step(*given, **how)), *where)
  reads = pretrainer_lib.ACROSS
  stages = accumulate.make_stages(*given, layout=job.layout, reads=reads, **how)
  if job.config.accumulate_stream:
    return stepping_lib.Streamed(stages.judged(judged), *where)
  return stepping_lib.Whole(judged(accumulate.make_train_step(stages)), *where)


def rows(job: Job) -> dict[str, Any]:
  """The rows of a batch that this process reads, and in which pieces.

  They are arguments of `pipeline.train_batches`.

  Raises:
    ValueError: a microbatch would have rows of other processes, or a teacher's update
      could not be taken back.
  """
  size, layout = job.config.batch_size, job.layout
  mine = sharding_lib.local_rows(size, job.mesh)
  if not job.config.accumulate_stream:
    return dict(rows=mine)
  if jax.process_count() > 1 and layout.parts != sharding_lib.batch_parts(job.mesh):
    raise ValueError(
      "config: accumulate_stream=True: neighbours that have to stay together"
      " (objectives.itm.group) lie on several devices, which several processes cannot"
      " stream: choose a smaller group, or lower accumulate."
    )
  if job.guard.decides and job.has_teacher:
    raise ValueError(
      "config: accumulate_stream=True moves the teacher (ema_decay) before the guard"
      ' can judge a step: say guard.nonfinite="stop" and guard.spike=None, or'
      " accumulate_stream=False."
    )
  runs = len(mine) * layout.parts // size
  return dict(rows=mine, pieces=layout.count, runs=runs)


def _check_accumulates(job):
  """That a step can be had by microbatches, where the config wants it."""
  if job.config.accumulate == 1:
    return
  if job.turns is not None:
    raise ValueError(
      f"config: accumulate={job.config.accumulate}: a run over several kinds of data"
      f" ({', '.join(job.feeds)}) takes whole batches: set accumulate=1."
    )
  if job.pretrainer.shares:
    raise ValueError(
      f"config: accumulate={job.config.accumulate}: objectives with a share"
      f" ({', '.join(job.pretrainer.shares)}) are drawn for a whole batch: set"
      " accumulate=1."
    )
  if job.abstract_state.memory.get("model"):
    raise ValueError(
      f"config: accumulate={job.config.accumulate}: model.image keeps statistics of the"
      " whole batch (batch norm): set accumulate=1."
    )


def programs(job: Job) -> list[stepping_lib.Program]:
  """All that a step of the run compiles, with the shapes it is called with."""
  return stepping(job).programs


def job(config: config_lib.Run, workdir: epath.Path) -> Job:
  """Checks a config as a whole, and builds what it names.

  Raises:
    ValueError, FileNotFoundError: what is wrong, where, and what to do about it; before
      anything is compiled.
  """
  config_lib.check(config)
  mesh = sharding_lib.make_mesh(sharding_lib.Sharding(**config.sharding))
  sharding_lib.check_batch(config.batch_size, mesh)
  train_source = source(config.data.source)
  words = tokenizer(config.tokenizer, train_source, workdir)
  built = shapes(
    config, mesh, vocab=words.vocab, length=words.length, examples=len(train_source)
  )
  rows(built)  # checked now, before anything is compiled
  sources = {config_lib.PAIRS: train_source}
  for name, spec in config.data.kinds.items():
    sources[name] = source(spec["source"], f"data.kinds.{name}.source")
    sharding_lib.check_batch(built.feeds[name].batch_size, mesh)
  return dataclasses.replace(
    built,
    workdir=workdir,
    source=train_source,
    tokenizer=words,
    feeds=feeds_lib.feeds(config, sources, built.pretrainer),
  )


def shapes(
  config: config_lib.Run,
  mesh: jax.sharding.Mesh,
  *,
  vocab: Any,
  length: int,
  examples: int,
) -> Job:
  """The job of a run without its data: what `plan` compiles.

  Args:
    mesh: perhaps of devices that are not here.
    vocab, length: of the tokenizer. examples: an epoch.
  """
  trained, batch, time = trained_on(
    config, vocab=vocab, length=length, examples=examples
  )
  optim = component("", config.optim, "optim", default=OPTIM, time=time)
  _check_frozen(trained.model, optim)
  params = step_lib.abstract_params(trained, batch)
  tx, schedule = optim_lib.make(optim, params, total_steps=time.total)
  made = Job(
    config=config,
    workdir=None,
    source=None,
    tokenizer=None,
    time=time,
    pretrainer=trained,
    mesh=mesh,
    sharding=sharding_lib.Sharding(**config.sharding),
    tx=tx,
    schedule=schedule,
    guard=guard_lib.Guard(**config.guard),
    preemption=preemption_lib.Preemption(**config.preemption),
    batch=batch,
    feeds=feeds_lib.feeds(config, {}, trained),
    turns=feeds_lib.turns(config),
  )
  _check_accumulates(made)
  return made


def trained_on(
  config: config_lib.Run, *, vocab: Any, length: int, examples: int
) -> tuple[pretrainer_lib.Pretrainer, dict[str, Any], clock_lib.Clock]:
  """Model and objectives, a global batch of theirs, and the clock of the run."""
  time = clock_lib.of(config, examples)
  trained = pretrainer(config, vocab=vocab, length=length, time=time)
  fed = feeds_lib.feeds(config, {}, trained)
  turns = feeds_lib.turns(config)
  batch = specs(fed, trained, length)
  for name, feed in fed.items():
    if feed.holds != "texts" and pp.leaves_sizes(feed.pp):
      _check_takes_sizes(trained.model.image, grids=pp.leaves_grids(feed.pp))
      part = batch if turns is None else batch[name]
      sized = [key for key in ("image", "image2") if key in part]
      sizes = jax.ShapeDtypeStruct((feed.batch_size, 2), np.int32)
      part |= {f"{key}_size": sizes for key in sized}
  return trained, batch, time


def specs(
  feeds: Mapping[str, feeds_lib.Feed], trained: pretrainer_lib.Pretrainer, length: int
) -> dict[str, Any]:
  """What a global batch looks like: of one kind of data, or {kind: of each}."""
  res = trained.model.image.res
  found = {n: feeds_lib.spec(f, res=res, length=length) for n, f in feeds.items()}
  return found if len(found) > 1 else found[config_lib.PAIRS]


def _check_takes_sizes(encoder, *, grids=False):
  """That padded images have an encoder which leaves the padding out."""
  takes = inspect.signature(type(encoder).__call__).parameters
  if grids:
    if "grid" not in takes:
      raise ValueError(
        "config: data.pp: naflex(…) makes rows of patches, but the encoder model.image"
        f" ({type(encoder).__module__}) reads squares: say model.image.type='naflex',"
        " or resize(…) instead of naflex(…)."
      )
  elif "size" not in takes:
    raise ValueError(
      "config: data.pp: fit(…) leaves images of several sizes on a canvas, but the"
      f" encoder model.image ({type(encoder).__module__}) reads whole squares: say"
      ' model.image.type="patches", or resize(…) instead of fit(…).'
    )


def _check_frozen(model, optim):
  """That what makes targets is not moved: it has no gradient, but would decay."""
  if model.codebook is None:
    return
  found = [f for p, f in optim.multipliers if re.search(p, "model/codebook/")]
  if not found or found[0]:
    raise ValueError(
      "config: model.codebook makes targets, and is not trained: say"
      ' optim.multipliers=((r"^model/codebook/", 0.0), …).'
    )


OPTIM = "vlp_jax.training.optim:Optim"


def batch_spec(
  batch_size: int,
  res: int | tuple[int, ...],
  length: int,
  objectives: Mapping[str, Any] = types.MappingProxyType({}),
) -> dict[str, jax.ShapeDtypeStruct]:
  """What a global batch looks like on the device, with what the objectives want."""
  shape, dtype = columns_lib.image(res)
  shapes = dict(
    image=((batch_size, *shape), np.dtype(dtype)),
    text=((batch_size, length), np.int32),
    text_mask=((batch_size, length), np.bool_),
    image_id=((batch_size,), np.int32),
  )
  for name, (shape, dtype) in columns_lib.of(objectives, res=res).specs.items():
    shapes[name] = ((batch_size, *shape), np.dtype(dtype))
  return {key: jax.ShapeDtypeStruct(*value) for key, value in shapes.items()}


def check_batches(
  job: Job, batches: Iterator[dict[str, np.ndarray]]
) -> Iterator[dict[str, np.ndarray]]:
  """The same batches, of which the first is looked at now, before anything is compiled.

  Raises:
    ValueError: it is not what the model was built for.
  """
  if job.turns is not None:
    # Other kinds are looked at when their turn comes, which is soon.
    return (_checked(job, each) for each in batches)
  first = next(batches)
  _check_batch(job, first, job.batch)
  return itertools.chain([first], batches)


def _checked(job, parts):
  for kind, part in parts.items():
    _check_batch(job, part, job.batch[kind])
  return parts


def _check_batch(job, first, specs):
  for key, spec in specs.items():
    if key not in first:
      raise ValueError(
        f"config: data: an example has no {key!r}, which an objective wants as"
        f" {spec.dtype}{list(spec.shape[1:])}; data.source gives"
        f" {', '.join(map(repr, first))}. Name a source that has it."
      )
    if first[key].shape[1:] != spec.shape[1:] or first[key].dtype != spec.dtype:
      got, want = (f"{x.dtype}{list(x.shape[1:])}" for x in (first[key], spec))
      hint = ""
      if key == "image":
        hint = " config.data.pp decides its size, model.image.res what the model takes."
        if pp.leaves_regions(job.config.data.pp):
          hint = (
            " Numbers of a region: regions(most, layout, features, classes) of data.pp"
            " must be as model.image's regions, places, features and classes."
          )
      raise ValueError(
        f"config: data: an example's {key} is {got}, but the model takes {want}.{hint}"
      )


def evaluators(job: Job) -> dict[str, Any]:
  """{name: evaluator}, bound to the model and to their data."""
  built = {}
  for name, spec in job.config.evals.items():
    where = f"evals.{name}"
    spec = {k: v for k, v in spec.items() if k != "every"}
    data = spec.pop("data", None)
    if not data or "source" not in data or "pp" not in data:
      raise ValueError(f"config: {where}.data is missing: say dict(source=…, pp=…).")
    batch_size = spec.pop("batch_size", job.config.batch_size)
    built[name] = component("evaluators", spec, where, default=name)
    more = {}
    if "file" in inspect.signature(built[name].setup).parameters:
      more["file"] = job.workdir / "predictions" / f"{name}.json"
    built[name].setup(
      pretrainer=job.pretrainer,
      source=source(data["source"], f"{where}.data.source"),
      tokenizer=job.tokenizer,
      pp=data["pp"],
      mesh=job.mesh,
      batch_size=batch_size,
      **more,
    )
  return built
