"""What a step keeps for its backward pass, in bytes: known before anything is compiled.

The layers of every tower are a scan, and what a forward scan hands to the backward one
is stacked, a row a layer. No compiler can do without it, so it is a lower bound of the
activations, and what a remat policy changes. Not counted is what a layer takes while it
is computed, nor how a chip pads its arrays: CLIP B/32 on a v5e was seen to take 1.8
times as much.
"""

from collections.abc import Set
import math
from typing import Any

from vlp_jax import job as job_lib
from vlp_jax.ops import tree
from vlp_jax.planning import flops
from vlp_jax.training import sharding as sharding_lib


def of_step(job: job_lib.Job) -> float:
  """Bytes over all devices together, of the program that keeps most."""
  state = {leaf.shape for leaf in tree.flatten(job.abstract_state.params).values()}
  most = 0.0
  with sharding_lib.use(job.mesh, job.sharding):
    for program in job_lib.programs(job):
      jaxpr = program.fn.trace(*program.args).jaxpr.jaxpr
      most = max(most, of(jaxpr, without=state))
  return most


def of(jaxpr: Any, *, without: Set[tuple[int, ...]]) -> float:
  """Bytes of what the scans in a jaxpr stack up.

  Of a scan within a scan, those of one time round; of branches the most.

  Args:
    without: shapes that do not count: those of parameters, of whose gradients a
      backward scan makes stacks.
  """
  total = 0.0
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name == "cond":
      total += max(of(each.jaxpr, without=without) for each in eqn.params["branches"])
      continue
    if name == "scan":
      layer = eqn.params["jaxpr"].jaxpr.outvars
      for var, own in zip(eqn.outvars, layer, strict=True):
        # What a layer hands to the next is of one shape inside and out.
        stacked = var.aval.shape != own.aval.shape
        if stacked and var.aval.shape not in without:
          total += math.prod(var.aval.shape) * var.aval.dtype.itemsize
    # What is mapped over a mesh is of one device.
    times = eqn.params["mesh"].size if name == "shard_map" else 1
    total += times * sum(of(each, without=without) for each in flops.inner(eqn.params))
  return total
