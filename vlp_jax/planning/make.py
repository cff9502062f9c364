"""Makes a plan: the run's programs compiled, and what they cost put together."""

from collections.abc import Sequence
import importlib.metadata
import math
from typing import Any

from vlp_jax import card as card_lib
from vlp_jax import config as config_lib
from vlp_jax import job as job_lib
from vlp_jax.ops import tree
from vlp_jax.planning import compiled as compiled_lib
from vlp_jax.planning import flops as flops_lib
from vlp_jax.planning import hardware
from vlp_jax.planning import result
from vlp_jax.planning import roofline
from vlp_jax.planning import run as run_lib
from vlp_jax.planning import topology as topology_lib


def plan(
  config: config_lib.Run,
  known: run_lib.Facts,
  topology: topology_lib.Topology,
  devices: Sequence[Any],
  chip: hardware.Chip,
  *,
  file: str,
  overrides: Sequence[str] = (),
  model_flops: float | None = None,
  exact: bool = False,
) -> tuple[result.Plan, job_lib.Job, str]:
  """Compiles the step of a run for devices, and says what it takes.

  Args:
    known: of the data. devices: of the topology. chip: one of them.
    file, overrides: how the config is called, for the record.
    model_flops: where they are known already. exact: see `compiled.compile`.

  Returns:
    The plan, the job, and the text of the compiled programs.

  Raises:
    ValueError: the config is not as it must be.
  """
  job, note = run_lib.job(config, known, devices)
  if len(job.readings) > 1:
    kinds = ", ".join(reading.kinds for reading in job.readings)
    mean = f"steps read {kinds} in turns: memory is of the largest, the rest their mean"
    note = f"{note}; {mean}" if note else mean
  if model_flops is None:
    model_flops = flops_lib.of_step(
      job, card_lib.stand_in(known.vocabulary, config.tokenizer)
    )
  made, texts = [], []
  for program in job_lib.programs(job):
    found, text = compiled_lib.compile(program, job, exact=exact)
    made.append(found)
    texts.append(text)
  needed, memory = footprint(job, made)
  seconds, limit, collectives, compiled_flops = {}, None, {}, None
  if all(each.cost is not None for each in made):
    nodes = -(-topology.devices // topology_lib.NODE)
    total = roofline.Times(0.0, 0.0, 0.0, 0.0)
    for each in made:
      total += roofline.times(each.cost, chip, nodes=nodes) * each.times
    seconds = dict(
      compute=total.compute,
      memory=total.memory,
      interconnect=total.messages,
      serial=total.serial,
      step=total.step,
    )
    limit = total.limit
    collectives = merge(made)
    compiled_flops = job.mesh.size * sum(
      each.times * sum(each.cost.flops.values()) for each in made
    )
  built = result.Plan(
    config=file,
    overrides=tuple(overrides),
    topology=topology.name,
    devices=job.mesh.size,
    mesh=dict(job.mesh.shape),
    batch_size=config.batch_size,
    steps=job.time.total,
    parameters=tree.size(job.abstract_state.params),
    note=note,
    memory=memory,
    needed=needed,
    capacity=chip.memory,
    usable=chip.usable,
    model_flops=model_flops,
    compiled_flops=compiled_flops,
    collectives=collectives,
    seconds=seconds,
    limit=limit,
    peak=chip.flops["half"],
    compile_seconds=sum(each.seconds for each in made),
    unknown_loops=tuple(n for e in made if e.cost for n in e.cost.unknown_loops),
    advice=(),
    versions=versions(topology.platform),
  )
  if not built.fits:
    said = advice(job, built)
    built = result.from_json(built.json() | dict(advice=said))
  return built, job, "\n".join(texts)


def resident(job: job_lib.Job) -> dict[str, float]:
  """Bytes of a device that the train state takes, by kind."""
  state = job.abstract_state
  return {
    "parameters": compiled_lib.held(state.params),
    "optimizer": compiled_lib.held((state.opt_state, state.step)),
    "teacher": compiled_lib.held(state.ema),
    "queues": compiled_lib.held(state.memory),
  }


def footprint(
  job: job_lib.Job, made: Sequence[compiled_lib.Compiled]
) -> tuple[float, dict[str, float]]:
  """(bytes of a device at most, {kind: bytes}), where the largest program runs.

  While a batch is in use, the next one is there and another on its way; while a
  microbatch is that the host streams, the next one is on its way (`stepping`).
  """
  largest = max(made, key=lambda each: each.needed)
  streams = job.config.accumulate_stream
  pieces = job.config.accumulate if streams else 1
  piece = compiled_lib.batch(job) / pieces
  to_come = piece if streams else 2 * piece
  kinds = resident(job) | {"batch": piece}
  rest = largest.needed - sum(kinds.values()) - largest.code
  kinds["activations and temporaries"] = max(0.0, rest)
  needed = largest.needed + to_come
  return needed, kinds | {"next batches": to_come, "program": largest.code}


def merge(
  made: Sequence[compiled_lib.Compiled],
) -> dict[str, dict[str, float]]:
  """Collectives of all programs of a step."""
  out = {}
  for each in made:
    for kind, row in each.cost.by_kind().items():
      there = out.setdefault(kind, dict.fromkeys(row, 0.0))
      for key, value in row.items():
        there[key] += each.times * value
  return out


def versions(platform: str) -> dict[str, str]:
  names = dict(tpu=("libtpu",), gpu=("jax-cuda12-plugin", "jax-cuda13-plugin"))
  found = {}
  for name in ("jax", *names.get(platform, ())):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue  # Of the two CUDA plugins, one is there.
  return found


def advice(job: job_lib.Job, plan: result.Plan) -> tuple[str, ...]:
  """What would make it fit, what costs least first; `--fit` tries these."""
  state = sum(resident(job).values())
  rest = plan.needed - state
  lines = [f"it lacks {(plan.needed - plan.usable) / result.GIB:.2f} GiB a device"]
  model = job.config.model
  if model.get("dtype", "float32") == "float32":
    lines.append(
      "--config.model.dtype=bfloat16: activations of half the size"
      f" (they take {rest / result.GIB:.1f} GiB)"
    )
  if model.get("remat", "none") == "none":
    lines.append(
      "--config.model.remat=dots_no_batch, or =full: a layer's activations are made"
      " again in the backward pass"
    )
  fsdp = dict(job.mesh.shape)["fsdp"]
  if fsdp == 1 and plan.devices > 1 and state > 0.1 * plan.usable:
    over = math.gcd(plan.devices, job.config.batch_size)
    lines.append(
      "--config.sharding.mesh.data=1 --config.sharding.mesh.fsdp=-1: the state"
      f" ({state / result.GIB:.1f} GiB) is split over up to {over} devices"
    )
  lines.append("more chips: activations shrink in proportion while the batch stays")
  lines.append("or let --fit try them")
  return tuple(lines)
