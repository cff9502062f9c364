"""One objective a step, drawn by shares (UNITER's task sampling): others cost nothing.

Official data/loader.py MetaLoader: a task is drawn for each step, in proportion to its
"mix_ratio". Here it is a function of (seed, step), the same on all devices, so that all
take the same branch of one compiled step.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlp_jax.ops import reduce

Result = tuple[Any, tuple[reduce.Mean, dict[str, reduce.Mean], Any]]


def one(
  run: Callable[[str | None], Result],
  metrics_of: Callable[[str], dict[str, reduce.Mean]],
  shares: Mapping[str, float],
  key: jax.Array,
) -> Result:
  """`run` of one of the names, or of None where there are no shares.

  Args:
    run: name -> (gradients, (loss, metrics, memory)): trees that differ by what metrics
      there are alone. A metric that the drawn one has not is of weight 0.
    metrics_of: name -> its metrics, without the work of gradients; only looked at.
    shares: {name: positive number}.
    key: PRNG key; the draw is a function of it.
  """
  if not shares:
    return run(None)
  names = list(shares)
  found = [jax.eval_shape(lambda name=name: metrics_of(name)) for name in names]
  known = list(dict.fromkeys(key for metrics in found for key in metrics))

  def branch(name):
    grads, (loss, metrics, memory) = run(name)
    none = reduce.Mean(jnp.float32(0.0), jnp.float32(0.0))
    return grads, (loss, {key: metrics.get(key, none) for key in known}, memory)

  logits = jnp.log(jnp.asarray(np.fromiter(shares.values(), np.float32)))
  at = jax.random.categorical(key, logits)
  return jax.lax.switch(at, [lambda name=name: branch(name) for name in names])
