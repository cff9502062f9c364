"""Microbatches make the step of one batch: loss, metrics, gradients, queue, teacher."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import tiny
from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.models import text as text_lib
from vlp_jax.objectives import itc
from vlp_jax.objectives import itm
from vlp_jax.objectives import lm
from vlp_jax.objectives import mlm
from vlp_jax.ops import tree
from vlp_jax.planning import cost as cost_lib
from vlp_jax.training import accumulate
from vlp_jax.training import microbatch
from vlp_jax.training import optim as optim_lib
from vlp_jax.training import sharding as sharding_lib
from vlp_jax.training import step as step_lib
from vlp_jax.training import stepping

BATCH, QUEUE, GROUP = 16, 32, 2
# float32 sums in another order, relative to the largest number of each array.
TOLERANCE = 1e-5
# What counts as the scale of an array of smaller numbers, as a share of the largest
# gradient: those of a key's bias, whose true gradient is zero, are what sums of larger
# numbers leave behind.
SMALLEST = 1e-2


def clip(**fields):
  fields = dict(targets="pair") | fields
  return pretrainer_lib.Pretrainer(
    tiny.model(depth=1).clone(fusion=None),
    dict(itc=itc.Objective(**fields)),
    dict(itc=1.0),
  )


def albef(layout="triples", queue=QUEUE, group=GROUP):
  built = tiny.model(depth=1)
  width = built.text.width
  words = dict(vocab=tiny.VOCAB, width=width)
  return pretrainer_lib.Pretrainer(
    built,
    dict(
      itc=itc.Objective(queue=queue, distill=0.4),
      itm=itm.Objective(width=width, group=group, exclude="pair", layout=layout),
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
  "albef_half": functools.partial(albef, layout="half"),
  "coca": coca,
}
TEACHERS = ("albef", "albef_half")


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
  return accumulate.make_train_step(stages(name, count, mesh))


def stages(name, count, mesh):
  module, tx, schedule, _ = parts(name)
  layout = microbatch.layout(
    module.objectives,
    batch_size=BATCH,
    count=count,
    parts=sharding_lib.batch_parts(mesh),
    lanes=sharding_lib.lanes(mesh, sharding_lib.Sharding()),
  )
  return accumulate.make_stages(
    module,
    tx,
    layout=layout,
    reads=pretrainer_lib.ACROSS,
    seed=0,
    ema_decay=0.9 if name in TEACHERS else None,
    schedule=schedule,
  )


@functools.cache
def stepped(name, count, *shape):
  """({path: value} after a step, metrics), on a mesh of data, fsdp and tensor."""
  shape = dict(zip(sharding_lib.MESH_AXES, shape or (1, 1, 1), strict=True))
  mesh, sharding = place(shape)
  state = parts(name)[3]
  with sharding_lib.use(mesh, sharding):
    out = sharding_lib.replicated(mesh)
    take = jax.jit(make(name, count, mesh), out_shardings=out)
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
  move = lambda x, path: np.float64(x[path]) - begun[path]
  params = [path for path in begun if path.startswith("params/")]
  largest = max(np.abs(move(after_one, path)).max() for path in params)
  for path, value in after_one.items():
    moved, moved_one = (move(x, path) for x in (after, after_one))
    scale = max(np.abs(moved_one).max(initial=0), SMALLEST * largest)
    np.testing.assert_allclose(
      moved, moved_one, rtol=0, atol=TOLERANCE * scale, err_msg=path
    )
    if value.dtype.kind == "i":
      np.testing.assert_array_equal(after[path], value, err_msg=path)


def check_is_the_plain_step(name, got):
  check_same(got, stepped(name, 1), tree.flatten(parts(name)[3]))


@pytest.mark.parametrize(
  "name, count, shape",
  [
    ("albef", 4, (1, 2, 1)),
    pytest.param("clip", 4, (2, 1, 1), marks=pytest.mark.slow),
    pytest.param("siglip", 8, (1, 1, 1), marks=pytest.mark.slow),
    pytest.param("coca", 2, (2, 2, 2), marks=pytest.mark.slow),
    pytest.param("clip", 2, (2, 2, 2), marks=pytest.mark.slow),
    pytest.param("siglip", 4, (2, 2, 1), marks=pytest.mark.slow),
    pytest.param("albef", 8, (1, 1, 1), marks=pytest.mark.slow),
    pytest.param("albef", 2, (2, 2, 2), marks=pytest.mark.slow),
    # Groups of two on two devices of a lane each.
    pytest.param("albef", 2, (2, 4, 1), marks=pytest.mark.slow),
    # Groups of two that the eight devices would part: rows move.
    pytest.param("albef", 2, (8, 1, 1), marks=pytest.mark.slow),
    pytest.param("albef_half", 4, (2, 1, 1), marks=pytest.mark.slow),
    pytest.param("coca", 8, (1, 1, 1), marks=pytest.mark.slow),
  ],
)
def test_microbatches_make_the_step_of_one_batch(name, count, shape):
  check_is_the_plain_step(name, stepped(name, count, *shape))


def test_the_step_that_is_compared_does_something():
  (after, metrics), begun = stepped("albef", 1), tree.flatten(parts("albef")[3])
  still = {path for path, value in begun.items() if (after[path] == value).all()}
  # A key's bias moves all scores of a softmax alike.
  params = {path for path in still if path.startswith("params/")}
  assert all(path.endswith("key/bias") for path in params), params
  # Weights are not what a mean of microbatches' means would have: rows differ.
  assert metrics["itm"].weight == 3 * BATCH
  assert 0 < metrics["mlm"].weight < 3 * BATCH
  assert after["memory/objectives_itc/ptr"] == BATCH


@pytest.mark.parametrize(
  "name, count, shape",
  [
    ("siglip", 4, (2, 1, 1)),
    pytest.param("albef", 2, (2, 2, 1), marks=pytest.mark.slow),
    pytest.param("coca", 4, (1, 1, 1), marks=pytest.mark.slow),
  ],
)
def test_streamed_from_the_host_it_is_the_same_step(name, count, shape):
  mesh, sharding = place(dict(zip(sharding_lib.MESH_AXES, shape, strict=True)))
  module, tx, _, state = parts(name)
  where = step_lib.abstract_state(
    module, tx, like(inputs()), ema=name in TEACHERS, mesh=mesh, sharding=sharding
  )
  state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, where))
  with sharding_lib.use(mesh, sharding):
    streamed = stepping.Streamed(stages(name, count, mesh), where, like(inputs()), mesh)
    layout = stages(name, count, mesh).layout
    numbers = np.arange(BATCH)
    pieces = [
      {k: v[np.asarray(layout.take(numbers, i))] for k, v in inputs().items()}
      for i in range(count)
    ]
    (fed,) = streamed.feed(pieces)
    state, metrics = streamed(state, fed)
  got = jax.tree.map(np.asarray, (tree.flatten(state), metrics))
  check_is_the_plain_step(name, got)
  # What is told of the programs is what has run: nothing is compiled anew.
  with sharding_lib.use(mesh, sharding):
    times = {program.name: program.times for program in streamed.programs}
  assert times["embed"] == times["backward"] == count and times["apply"] == 1


def test_gradients_are_summed_over_devices_once_a_step():
  mesh, sharding = place(dict(data=8))
  module, tx, *_ = parts("siglip")
  where = step_lib.abstract_state(
    module, tx, like(inputs()), ema=False, mesh=mesh, sharding=sharding
  )
  size = sum(4 * x.size for x in jax.tree.leaves(where.params))
  with sharding_lib.use(mesh, sharding):
    taken = stepping.Streamed(stages("siglip", 2, mesh), where, like(inputs()), mesh)
    programs = {program.name: program for program in taken.programs}
    sent = {}
    for name in ("backward", "apply"):
      program = programs[name]
      text = program.fn.lower(*program.args).compile().as_text()
      sums = cost_lib.of(text, devices=8).by_kind()
      sent[name] = {kind: row["bytes"] for kind, row in sums.items()}
  assert sent["backward"].get("all-reduce", 0) < 0.01 * size, sent
  assert sent["apply"] == {"all-reduce": size}


# --- What encoders draw --------------------------------------------------------


class Dropping:
  """A pretrainer that tells which keys its passes are given, as its embeddings."""

  def __init__(self, weights):
    self.weights = weights

  def apply(self, variables, batch, *args, method, rngs, **fields):
    drawn = jnp.stack([jax.random.uniform(rngs[name]) for name in step_lib.STREAMS])
    scale = variables["params"]["a"]
    z = scale * jnp.broadcast_to(drawn, (len(batch["x"]), len(drawn)))
    if method == "embed":
      return dict(live=dict(zimg=z), teacher={})
    if method == "rows":
      return dict(zimg=z), {}
    (embedded,) = args
    return (jnp.sum(embedded["live"]["zimg"] ** 2), ({}, {})), {"memory": {}}


@pytest.mark.parametrize("lanes", [1, 2])
def test_both_passes_over_a_microbatch_draw_the_same_and_others_differ(lanes):
  # The loss is a^2 times the squares of what is drawn, so its gradient by microbatches
  # is 2 a times that only if the second pass draws what the first did.
  module, layout = Dropping({}), microbatch.Layout(8, 4, parts=lanes, lanes=lanes)
  stages = accumulate.make_stages(
    module,
    optax.sgd(1.0),
    layout=layout,
    reads=("x",),
    seed=0,
    ema_decay=None,
    schedule=lambda step: 1.0,
  )
  params = {"a": jnp.float32(3.0)}
  state = step_lib.TrainState(
    step=jnp.int32(0),
    params=params,
    opt_state=optax.sgd(1.0).init(params),
    ema=None,
    memory={},
  )
  batch = {"x": jnp.zeros(8)}
  with sharding_lib.use(*place(dict(data=lanes))):
    new, metrics = jax.jit(accumulate.make_train_step(stages))(state, batch)
    rows = [stages.embed(state, {"x": jnp.zeros(2)}, i, None) for i in range(4)]
  moved = params["a"] - new.params["a"]
  np.testing.assert_allclose(moved, 2 * metrics["loss"].value() / 3.0, rtol=1e-6)
  # One draw for each lane of each microbatch.
  drawn = np.stack([np.asarray(each["live"]["zimg"])[:: 2 // lanes] for each in rows])
  assert len(np.unique(drawn)) == drawn.size == 4 * lanes * len(step_lib.STREAMS)
