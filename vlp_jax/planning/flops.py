"""Model FLOPs: of products that the mathematics asks for, and nothing made twice."""

from collections.abc import Callable
import math
from typing import Any

import jax
from jax.extend import core

from vlp_jax import job as job_lib
from vlp_jax.planning import run as run_lib
from vlp_jax.training import sharding as sharding_lib
from vlp_jax.training import step as step_lib


def of_step(job: job_lib.Job, vocab: Any) -> float:
  """Floating-point operations of one optimizer step, over the global batch.

  Of steps that read different kinds of data, the mean.
  Of the step without rematerialisation: forward, backward, and the teacher's forward.

  Args:
    vocab: that the job's text tower was built for.
  """
  config = run_lib.nothing_twice(job.config)
  plain, _, _ = job_lib.trained_on(
    config,
    vocab=vocab,
    length=config.tokenizer["length"],
    examples=job.time.epoch_size,
  )
  step = step_lib.make_train_step(
    plain,
    job.tx,
    seed=config.seed,
    ema_decay=config.ema_decay,
    schedule=job.schedule,
  )
  state = job.abstract_state
  with sharding_lib.use(job.mesh, job.sharding):
    return sum(r.share * count(step, state, dict(r.batch)) for r in job.readings)


def count(function: Callable, *args: Any) -> float:
  """Operations of `function(*args)`; the arguments may be shapes."""
  return of(jax.make_jaxpr(function)(*args).jaxpr)


def of(jaxpr: Any) -> float:
  """Operations of matrix products and convolutions in a jaxpr, those within included.

  A scan counts as often as it runs; of branches the dearest; what is mapped over a mesh
  on every device. A while loop counts once: nobody knows how often it runs.
  """
  total = 0.0
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name == "dot_general":
      total += _dot(eqn)
    elif name == "conv_general_dilated":
      total += _convolution(eqn)
    elif name == "scan":
      total += eqn.params["length"] * of(eqn.params["jaxpr"].jaxpr)
    elif name == "cond":
      total += max(of(branch.jaxpr) for branch in eqn.params["branches"])
    elif name == "shard_map":
      total += eqn.params["mesh"].size * of(_opened(eqn.params["jaxpr"]))
    else:
      total += sum(of(each) for each in inner(eqn.params))
  return total


def _opened(jaxpr):
  return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def inner(params):
  """Jaxprs among the parameters of an equation: of jit, of loops, of derivatives."""
  for value in params.values():
    if isinstance(value, (core.ClosedJaxpr, core.Jaxpr)):
      yield _opened(value)


def _dot(eqn):
  (contracted, _), _ = eqn.params["dimension_numbers"]
  left = eqn.invars[0].aval.shape
  return (
    2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
  )


def _convolution(eqn):
  numbers = eqn.params["dimension_numbers"]
  kernel = eqn.invars[1].aval.shape
  # Of the kernel all but its output features: what one number of the output sums over.
  reach = math.prod(kernel) / kernel[numbers.rhs_spec[0]]
  return 2.0 * math.prod(eqn.outvars[0].aval.shape) * reach
