"""Two steps of a tiny ALBEF on four devices, as one of several processes takes them.

  python -m tests.training.taking_steps INDEX COUNT PORT FILE

The first process writes FILE: the state, the metrics and the negatives that were drawn.
"""

import sys

import jax
import numpy as np

from tests import tiny
from tests.training import test_sharding
from vlp_jax.ops import tree
from vlp_jax.training import optim as optim_lib
from vlp_jax.training import sharding as sharding_lib
from vlp_jax.training import step as step_lib

DEVICES, BATCH, QUEUE = 4, 8, 16


def main(index: int, count: int, port: int, path: str) -> None:
  jax.config.update("jax_num_cpu_devices", DEVICES // count)
  if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
  assert len(jax.devices()) == DEVICES and jax.process_count() == count
  # Columns of the contrast go round the processes, and dropout is drawn.
  module = tiny.albef(depth=1, queue=QUEUE, dropout=0.1, backend="ring")
  config = optim_lib.Optim(name="sgd", b1=0.0, lr=1.0, schedule="constant", bounds=())
  like = test_sharding.like(tiny.batch(BATCH))
  shapes = step_lib.abstract_params(module, like)
  tx, schedule = optim_lib.make(config, shapes, total_steps=10)
  sharding = sharding_lib.Sharding(mesh=dict(data=2, fsdp=2))
  mesh = sharding_lib.make_mesh(sharding)
  fields = dict(ema=True, mesh=mesh, sharding=sharding)
  state = step_lib.init_state(module, tx, like, seed=0, **fields)
  step = step_lib.make_train_step(
    test_sharding.Telling(module), tx, seed=0, ema_decay=0.9, schedule=schedule
  )
  rows = rows_of(mesh)
  with sharding_lib.use(mesh, sharding):
    whole = sharding_lib.replicated(mesh)
    take = jax.jit(
      step, out_shardings=(jax.tree.map(lambda x: x.sharding, state), whole)
    )
    told = []
    for i in range(2):
      batch = {k: v[rows] for k, v in tiny.batch(BATCH, seed=i).items()}
      state, metrics = take(state, sharding_lib.put_batch(batch, mesh))
      told.append(metrics)
    state = jax.jit(lambda x: x, out_shardings=whole)(state)
  if index == 0:
    found = {f"state/{k}": np.asarray(v) for k, v in tree.flatten(state).items()}
    for i, metrics in enumerate(told):
      found |= {f"{i}/drawn/{k}": v for k, v in enumerate(metrics.pop("drawn"))}
      found |= {f"{i}/metrics/{k}": v.value() for k, v in metrics.items()}
    np.savez(path, **{k: np.asarray(v) for k, v in found.items()})


def rows_of(mesh):
  """The rows of a batch that this process's devices hold."""
  split = jax.sharding.PartitionSpec(("data", "fsdp"))
  places = jax.sharding.NamedSharding(mesh, split)
  held = places.addressable_devices_indices_map((BATCH,)).values()
  return sorted({row for (at,) in held for row in range(*at.indices(BATCH))})


if __name__ == "__main__":
  main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
