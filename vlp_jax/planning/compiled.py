"""Compiles the programs of a step for hardware that is not here, and reads them."""

import contextlib
import dataclasses
import math
import re
import time
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from vlp_jax import job as job_lib
from vlp_jax.planning import cost as cost_lib
from vlp_jax.training import sharding as sharding_lib
from vlp_jax.training import stepping as stepping_lib


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler says of a program, in bytes of one device.

  Attributes:
    arguments: that come in; donated: of these, what the results are written into.
    results: that come out, donated or not. temporaries: all else while it runs.
    code: of the program itself.
    needed: of all, at most at once; with what it is handed and does not read.
    cost: None where the compiler gave up for want of memory.
    seconds: that compiling took.
  """

  name: str
  times: float
  arguments: float
  donated: float
  results: float
  temporaries: float
  code: float
  needed: float
  cost: cost_lib.Cost | None
  seconds: float


def batch(job: job_lib.Job) -> float:
  """Bytes of a device that a batch takes; of several kinds of data, the largest."""
  split = NamedSharding(job.mesh, PartitionSpec(("data", "fsdp")))
  place = lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=split)
  return max(held(jax.tree.map(place, dict(r.batch))) for r in job.readings)


def compile(
  program: stepping_lib.Program, job: job_lib.Job, *, exact: bool = False
) -> tuple[Compiled, str]:
  """Compiles for the devices of the job's mesh.

  Args:
    exact: as the trainer compiles. Else the compiler is asked for little effort, which
      takes a quarter of the time (README, "Plan", says what that changes).

  Returns:
    What the compiler says, and the text of the program, "" where there is none.
  """
  begun = time.monotonic()
  with sharding_lib.use(job.mesh, job.sharding), _effort(quick=not exact):
    lowered = program.lower()
    try:
      options = OPTIONS.get(_platform(job.mesh), {}) | dict(program.options or {})
      made = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
      needed = needed_of(str(error), held(program.args))
      if needed is None:
        raise
      return _refused(program, needed, time.monotonic() - begun), ""
  seconds = time.monotonic() - begun
  text, said = made.as_text(), made.memory_analysis()
  sizes = dict(
    arguments=said.argument_size_in_bytes,
    donated=said.alias_size_in_bytes,
    results=said.output_size_in_bytes,
    temporaries=said.temp_size_in_bytes,
    code=said.generated_code_size_in_bytes,
  )
  # What a program is handed and does not read is not among its arguments, but there.
  unread = max(0.0, held(program.args) - sizes["arguments"])
  needed = sum(sizes.values()) - 2 * sizes["donated"] + unread
  cost = cost_lib.of(text, devices=job.mesh.size)
  found = Compiled(
    program.name, program.times, **sizes, needed=needed, cost=cost, seconds=seconds
  )
  return found, text


# Triton's products want tiles that only a GPU can choose, by trying; without one the
# default ones fail to compile for some shapes. cuBLAS's work for all.
OPTIONS = {"gpu": {"xla_gpu_enable_triton_gemm": False}}


def _platform(mesh):
  return mesh.devices.flat[0].platform


def _refused(program, needed, seconds):
  """Of a program for which the device's memory does not do."""
  there = held(program.args)
  return Compiled(
    name=program.name,
    times=program.times,
    arguments=there,
    donated=0.0,
    results=0.0,
    temporaries=max(0.0, needed - there),
    code=0.0,
    needed=needed,
    cost=None,
    seconds=seconds,
  )


# Asks XLA for little effort, of -1 to 1; JAX 0.12 has levels in its place.
QUICK = {"jax_exec_time_optimization_effort": -1.0, "jax_optimization_level": "O1"}


@contextlib.contextmanager
def _effort(*, quick):
  name = next(name for name in QUICK if name in jax.config.values)
  before = jax.config.values[name]
  if quick:
    jax.config.update(name, QUICK[name])
  try:
    yield
  finally:
    jax.config.update(name, before)


_UNITS = dict(K=2.0**10, M=2.0**20, G=2.0**30, T=2.0**40)


def needed_of(message: str, arguments: float) -> float | None:
  """Bytes that a program would take, of the TPU compiler's refusal; None: it is none.

  "Used 35.38G of 15.75G hbm" is of all; "the total memory required for HLO temporaries
  (37.65G) exceeds available HBM (15.75G)" is without the arguments.
  """
  found = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", message)
  if found:
    return float(found[1]) * _UNITS[found[2]]
  found = re.search(
    r"required for HLO temporaries \(([\d.]+)([KMGT])\) exceeds available", message
  )
  return float(found[1]) * _UNITS[found[2]] + arguments if found else None


def held(tree: Any) -> float:
  """Bytes of one device that arrays take, by their shapes and shardings."""
  total = 0.0
  for leaf in jax.tree.leaves(tree):
    # A number of the host has no sharding: it is whole everywhere.
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    total += leaf.dtype.itemsize * math.prod(shape)
  return total
