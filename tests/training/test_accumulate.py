"""Microbatches make the step of one batch: loss, metrics, gradients, queue, teacher."""

import functools

import jax
import numpy as np
import pytest

from tests import tiny
from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.models import text as text_lib
from vlp_jax.objectives import itc
from vlp_jax.objectives import itm
from vlp_jax.objectives import lm
from vlp_jax.objectives import mlm
from vlp_jax.ops import tree
from vlp_jax.training import accumulate
from vlp_jax.training import optim as optim_lib
from vlp_jax.training import sharding as sharding_lib
from vlp_jax.training import step as step_lib

BATCH, QUEUE, GROUP = 16, 32, 2
# float32 sums in another order, relative to the largest number of each array.
TOLERANCE = 1e-5
# As in test_sharding.py: of arrays of smaller numbers.
SMALLEST = 1e-2


def clip(**fields):
  fields = dict(targets="pair") | fields
  return pretrainer_lib.Pretrainer(
    tiny.model(depth=1).clone(fusion=None),
    dict(itc=itc.Objective(**fields)),
    dict(itc=1.0),
  )


def albef(layout="triples"):
  built = tiny.model(depth=1)
  width = built.text.width
  words = dict(vocab=tiny.VOCAB, width=width)
  return pretrainer_lib.Pretrainer(
    built,
    dict(
      itc=itc.Objective(queue=QUEUE, distill=0.4),
      itm=itm.Objective(width=width, group=GROUP, exclude="pair", layout=layout),
      mlm=mlm.Objective(**words, rate=0.3, distill=0.4, max_masked=3),
    ),
    dict(itc=1.0, itm=0.5, mlm=2.0),
  )


def coca():
  built = tiny.model(depth=1)
  width = built.text.width
  text = text_lib.Encoder(
    vocab=tiny.VOCAB,
    width=width,
    length=11,
    depth=1,
    num_heads=2,
    mlp_dim=32,
    types=0,
    norm="pre",
    attention="causal",
    class_token="shifted",
    init_std=None,
  )
  words = dict(vocab=tiny.VOCAB, width=width)
  head = dict(transform=False, tied=False, bias=False)
  return pretrainer_lib.Pretrainer(
    built.clone(text=text, scale="log_scale"),
    dict(
      itc=itc.Objective(targets="pair", backend="ring", tile=5),
      lm=lm.Objective(**words, **head, parallel=0.0),
    ),
    dict(itc=1.0, lm=2.0),
  )


MODULES = {
  "clip": clip,
  "siglip": functools.partial(clip, loss="sigmoid", bias=-2.0, targets="image"),
  "albef": albef,
  "coca": coca,
}
TEACHERS = ("albef",)


def inputs(seed=0):
  """Texts of different lengths; two pairs of rows show the same image."""
  batch = tiny.batch(BATCH, seed=seed)
  batch["image_id"][[3, 8]] = batch["image_id"][[2, 15]]
  return batch


def like(batch):
  return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}


@functools.cache
def parts(name):
  """(module, tx, schedule, fresh state as numpy); SGD: moved by the gradient."""
  module = MODULES[name]()
  config = optim_lib.Optim(name="sgd", b1=0.0, lr=1.0, schedule="constant", bounds=())
  shapes = step_lib.abstract_params(module, inputs())
  tx, schedule = optim_lib.make(config, shapes, total_steps=10)
  mesh, sharding = place(dict(data=1))
  state = step_lib.init_state(
    module,
    tx,
    like(inputs()),
    seed=0,
    ema=name in TEACHERS,
    mesh=mesh,
    sharding=sharding,
  )
  # The teacher is another than the model.
  state = jax.tree.map(np.asarray, state)
  if state.ema is not None:
    state = state.replace(ema=jax.tree.map(lambda x: x * np.float32(0.8), state.ema))
  return module, tx, schedule, state


def place(shape):
  sharding = sharding_lib.Sharding(mesh=shape)
  count = int(np.prod(list(shape.values())))
  return sharding_lib.make_mesh(sharding, jax.devices()[:count]), sharding


def make(name, count, mesh):
  """The step in `count` microbatches; 1: the plain step."""
  module, tx, schedule, _ = parts(name)
  fields = dict(seed=0, ema_decay=0.9 if name in TEACHERS else None, schedule=schedule)
  if count == 1:
    return step_lib.make_train_step(module, tx, **fields)
  layout = accumulate.layout(
    module.objectives,
    batch_size=BATCH,
    count=count,
    parts=sharding_lib.batch_parts(mesh),
  )
  reads = pretrainer_lib.ACROSS
  stages = accumulate.make_stages(module, tx, layout=layout, reads=reads, **fields)
  return accumulate.make_train_step(stages)


@functools.cache
def stepped(name, count, **shape):
  """({path: value} after a step, metrics)."""
  mesh, sharding = place(shape or dict(data=1))
  _, _, _, state = parts(name)
  with sharding_lib.use(mesh, sharding):
    take = jax.jit(make(name, count, mesh), out_shardings=sharding_lib.replicated(mesh))
    state, metrics = take(state, sharding_lib.put_batch(inputs(), mesh))
  return jax.tree.map(np.asarray, (tree.flatten(state), metrics))


def check_same(got, want, begun):
  (after, metrics), (after_one, metrics_one) = got, want
  assert metrics.keys() == metrics_one.keys()
  for key, mean in metrics_one.items():
    np.testing.assert_allclose(
      metrics[key].value(), mean.value(), rtol=TOLERANCE, err_msg=key
    )
    np.testing.assert_allclose(metrics[key].weight, mean.weight, err_msg=key)
  assert after.keys() == after_one.keys()
  for path, value in after_one.items():
    moved, moved_one = (np.float64(x[path]) - begun[path] for x in (after, after_one))
    scale = max(np.abs(moved_one).max(initial=0), SMALLEST)
    np.testing.assert_allclose(
      moved, moved_one, rtol=0, atol=TOLERANCE * scale, err_msg=path
    )
    if value.dtype.kind == "i":
      np.testing.assert_array_equal(after[path], value, err_msg=path)


@pytest.mark.parametrize(
  "name, count", [("clip", 4), ("siglip", 8), ("albef", 4), ("coca", 2)]
)
def test_microbatches_make_the_step_of_one_batch(name, count):
  begun = tree.flatten(parts(name)[3])
  check_same(stepped(name, count), stepped(name, 1), begun)
