"""Meshes, the table of axes, and that one run is the same run on any mesh."""

import dataclasses
import logging
import re
import threading
import time
import types

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from tests import tiny
from vlp_jax.ops import tree
from vlp_jax.training import checkpoint as checkpoint_lib
from vlp_jax.training import optim as optim_lib
from vlp_jax.training import sharding as sharding_lib
from vlp_jax.training import step as step_lib

BATCH, QUEUE = 8, 16
MESHES = {
  "1x1x1": dict(data=1),
  "8x1x1": dict(data=8),
  "1x8x1": dict(fsdp=8),
  "2x2x2": dict(data=2, fsdp=2, tensor=2),
}
# float32 sums in another order, relative to the largest number of each array.
TOLERANCE = 1e-5
# What counts as the scale of an array of smaller numbers: those of a key's bias, whose
# true gradient is zero, are what sums of numbers near 1 leave behind.
SMALLEST = 1e-2


def place(name, **rules):
  """(mesh, sharding) over as many of the eight devices as the name says."""
  sharding = sharding_lib.Sharding(mesh=MESHES[name], rules=rules)
  count = int(np.prod([int(size) for size in name.split("x")]))
  return sharding_lib.make_mesh(sharding, jax.devices()[:count]), sharding


# --- Meshes --------------------------------------------------------------------


@pytest.mark.parametrize(
  ("wanted", "shape"),
  [
    ({"data": -1}, (8, 1, 1)),
    ({}, None),
    ({"data": 8}, (8, 1, 1)),
    ({"fsdp": -1}, (1, 8, 1)),
    ({"data": 2, "fsdp": -1}, (2, 4, 1)),
    ({"tensor": 2, "data": -1, "fsdp": 2}, (2, 2, 2)),
    ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
  ],
)
def test_mesh_shape(wanted, shape):
  if shape is None:
    with pytest.raises(ValueError, match="makes 1 devices, but there are 8"):
      sharding_lib.mesh_shape(wanted, 8)
  else:
    assert sharding_lib.mesh_shape(wanted, 8) == shape


@pytest.mark.parametrize(
  ("wanted", "message"),
  [
    (
      {"data": 4},
      "data=4 x fsdp=1 x tensor=1 makes 4 devices, but there are 8: set one axis to -1",
    ),
    ({"data": 16}, "makes 16 devices, but there are 8: set one axis to -1"),
    (
      {"data": -1, "fsdp": 3},
      "data=-1 x fsdp=3 x tensor=1: 8 devices do not divide by 3",
    ),
    ({"data": -1, "fsdp": -1}, "only one axis may be -1"),
    ({"model": 2}, "model: no such axis; there are data, fsdp, tensor"),
    ({"data": 0}, "data=0: want 1 or more, or -1"),
    ({"data": -2}, "data=-2: want 1 or more, or -1"),
  ],
)
def test_meshes_that_cannot_be(wanted, message):
  with pytest.raises(ValueError, match="config: sharding.mesh.*" + re.escape(message)):
    sharding_lib.mesh_shape(wanted, 8)


def test_the_default_mesh_takes_all_devices_for_data():
  mesh = sharding_lib.make_mesh(sharding_lib.Sharding())
  assert dict(mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
  ("size", "message"),
  [(6, "choose 4 or 8"), (3, "choose 4 or 4"), (9, "choose 8 or 12")],
)
def test_a_batch_that_does_not_divide(size, message):
  mesh, _ = place("2x2x2")
  with pytest.raises(ValueError, match=f"batch_size={size} is not a.*= 4: {message}"):
    sharding_lib.check_batch(size, mesh)


@pytest.mark.parametrize("size", [4, 8, 64])
def test_a_batch_that_divides(size):
  sharding_lib.check_batch(size, place("2x2x2")[0])


@pytest.mark.parametrize(
  ("rules", "message"),
  [
    ({"embd": "fsdp"}, "sharding.rules.embd: no such logical axis; there are batch, "),
    (
      {"embed": "model"},
      "sharding.rules.embed='model': 'model' is no axis of the mesh",
    ),
    (
      {"embed": ("fsdp", "model")},
      "sharding.rules.embed=('fsdp', 'model'): 'model' is no axis of the mesh",
    ),
  ],
)
def test_rules_that_cannot_be(rules, message):
  with pytest.raises(ValueError, match="config: " + re.escape(message)):
    sharding_lib.Sharding(rules=rules).table()


# --- Where arrays lie ----------------------------------------------------------


def spec(names, shape, **rules):
  mesh, sharding = place("2x2x2", **rules)
  boxed = nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, np.float32), names)
  return sharding_lib.shardings(boxed, mesh, sharding).spec


def test_rules_place_dimensions():
  assert spec(("embed", "mlp"), (4, 6)) == PartitionSpec("fsdp", "tensor")
  assert spec(("batch", None), (4, 6)) == PartitionSpec(("data", "fsdp"), None)
  assert spec(("embed", "mlp"), (4, 6), mlp=None) == PartitionSpec("fsdp", None)


def test_a_dimension_that_does_not_divide_stays_whole_and_is_told_of_once(caplog):
  caplog.set_level(logging.INFO)
  sharding_lib._TOLD.clear()
  for _ in range(2):
    assert spec(("embed", "mlp"), (5, 6)) == PartitionSpec(None, "tensor")
  # 6 rows divide by data alone, but not by data x fsdp.
  assert spec(("queue",), (6,)) == PartitionSpec(None)
  told = [record.getMessage() for record in caplog.records]
  assert told == [
    "('embed', 'mlp') of shape (5, 6) stays whole: fsdp has 2 parts.",
    "('queue',) of shape (6,) stays whole: ('data', 'fsdp') has 4 parts.",
  ]


def test_what_has_no_names_is_replicated():
  mesh, sharding = place("2x2x2")
  shape = jax.ShapeDtypeStruct((8,), np.float32)
  assert sharding_lib.shardings(shape, mesh, sharding).is_fully_replicated


def test_each_part_of_data_may_sum_its_own_gradient():
  mesh, sharding = place("2x2x2")
  assert sharding_lib.lanes(mesh, sharding) == 2
  gpus = np.array([types.SimpleNamespace(platform="gpu")])
  there = types.SimpleNamespace(devices=gpus, shape=dict(mesh.shape))
  assert sharding_lib.lanes(there, sharding) == 1
  # Not where parameters, or their gradients, lie over these parts.
  mesh, sharding = place("2x2x2", embed=("data", "fsdp"))
  assert sharding_lib.lanes(mesh, sharding) == 1


def test_a_batch_is_split_over_data_and_fsdp():
  mesh, _ = place("2x2x2")
  (image,) = sharding_lib.put_batch({"image": np.arange(8)}, mesh).values()
  assert {shard.data.shape for shard in image.addressable_shards} == {(2,)}
  np.testing.assert_array_equal(image, np.arange(8))


def test_prefetch_gives_all_batches_in_order_and_stays_ahead():
  mesh, _ = place("8x1x1")
  asked = []

  def batches():
    for i in range(5):
      asked.append(i)
      yield {"x": np.full(8, i)}

  got = sharding_lib.prefetch(batches(), mesh, size=3)
  first = next(got)
  until = time.monotonic() + 60
  while len(asked) < 3 and time.monotonic() < until:
    time.sleep(0.01)
  assert asked == [0, 1, 2]
  rest = [int(batch["x"][0]) for batch in got]
  assert [int(first["x"][0]), *rest] == [0, 1, 2, 3, 4]


def test_prefetch_of_fewer_batches_than_it_is_ahead():
  mesh, _ = place("8x1x1")
  assert len(list(sharding_lib.prefetch([{"x": np.zeros(8)}], mesh, size=3))) == 1


def test_what_goes_wrong_with_a_batch_is_raised_in_its_turn():
  mesh, _ = place("8x1x1")

  def batches():
    yield {"x": np.zeros(8)}
    yield {"x": np.ones(8)}
    raise OSError("no such shard")

  got = sharding_lib.prefetch(batches(), mesh)
  assert [float(next(got)["x"][0]) for _ in range(2)] == [0, 1]
  with pytest.raises(OSError, match="no such shard"):
    next(got)
  assert next(got, None) is None


def test_prefetch_ends_with_its_consumer():
  mesh, _ = place("8x1x1")
  before = threading.active_count()
  endless = sharding_lib.prefetch(iter(lambda: {"x": np.zeros(8)}, None), mesh)
  next(endless)
  assert threading.active_count() == before + 1
  endless.close()
  assert threading.active_count() == before


# --- A whole run ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Telling:
  """A pretrainer whose metrics hold the negatives that ITM drew."""

  inside: nn.Module

  @property
  def shares(self):
    return self.inside.shares

  def apply(self, variables, *args, mutable, **fields):
    (loss, metrics), new = self.inside.apply(
      variables,
      *args,
      mutable=[*mutable, "intermediates"],
      capture_intermediates=lambda module, method: method == "mine",
      **fields,
    )
    mined = dict(new.pop("intermediates"))["objectives_itm"]["mine"]
    return (loss, metrics | {"drawn": mined[0]}), new


@pytest.fixture(scope="module")
def parts():
  """Model, optimiser and their fields that all meshes share."""
  # Width 16, so that 8 divides it; SGD of rate 1 without momentum: the parameters move
  # by their gradient.
  module = tiny.albef(depth=1, queue=QUEUE, dropout=0.1)
  config = optim_lib.Optim(name="sgd", b1=0.0, lr=1.0, schedule="constant", bounds=())
  shapes = step_lib.abstract_params(module, tiny.batch(BATCH))
  return module, *optim_lib.make(config, shapes, total_steps=10)


def like(batch):
  return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}


@pytest.fixture(scope="module")
def fresh(parts):
  """A fresh state, as numpy."""
  module, tx, _ = parts
  mesh, sharding = place("1x1x1")
  batch = like(tiny.batch(BATCH))
  state = step_lib.init_state(
    module, tx, batch, seed=0, ema=True, mesh=mesh, sharding=sharding
  )
  return jax.tree.map(np.asarray, state)


@pytest.fixture(scope="module")
def start(fresh):
  """What every mesh starts from.

  Beside a norm's scale of 1, float32 has no digit for 1e-5 of the gradient it moved by.
  """

  def begin(path, value):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return value * np.float32(0.25) if name.endswith("/scale") else value

  return jax.tree_util.tree_map_with_path(begin, fresh)


@pytest.fixture(scope="module")
def stepped(parts, start):
  """mesh name -> ({path: value} after two steps, [metrics of each])."""
  module, tx, schedule = parts
  found = {}

  def run(name):
    if name in found:
      return found[name]
    mesh, sharding = place(name)
    fields = dict(ema=True, mesh=mesh, sharding=sharding)
    where = step_lib.abstract_state(module, tx, like(tiny.batch(BATCH)), **fields)
    places = jax.tree.map(lambda x: x.sharding, where)
    state = jax.device_put(start, places)
    take = step_lib.make_train_step(
      Telling(module), tx, seed=0, ema_decay=0.9, schedule=schedule
    )
    told, after = [], []
    with sharding_lib.use(mesh, sharding):
      take = jax.jit(
        take,
        donate_argnums=0,
        out_shardings=(places, sharding_lib.replicated(mesh)),
      )
      for i in range(2):
        batch = sharding_lib.put_batch(tiny.batch(BATCH, seed=i), mesh)
        state, metrics = take(state, batch)
        told.append(jax.tree.map(np.asarray, metrics))
        after.append({k: np.asarray(v) for k, v in tree.flatten(state).items()})
    assert take._cache_size() == 1
    found[name] = after, told, tree.flatten(jax.tree.map(lambda x: x.sharding, state))
    return found[name]

  return run


@pytest.mark.parametrize("name", [name for name in MESHES if name != "1x1x1"])
def test_a_step_is_the_same_on_every_mesh(stepped, start, name):
  (got, got_told, _), (want, want_told, _) = stepped(name), stepped("1x1x1")
  begun = tree.flatten(start)
  for after, metrics, after_one, metrics_one in zip(
    got, got_told, want, want_told, strict=True
  ):
    # Who is drawn is told by one digit: were it another, all the rest would differ.
    for drawn, drawn_one in zip(metrics["drawn"], metrics_one["drawn"], strict=True):
      np.testing.assert_array_equal(drawn, drawn_one)
    for key in metrics_one.keys() - {"drawn"}:
      np.testing.assert_allclose(
        metrics[key].value(), metrics_one[key].value(), rtol=TOLERANCE, err_msg=key
      )
    assert after.keys() == after_one.keys()
    for path, value in after_one.items():
      # By what has moved: parameters by their gradients.
      moved, moved_one = (np.float64(x[path]) - begun[path] for x in (after, after_one))
      scale = max(np.abs(moved_one).max(), SMALLEST)
      np.testing.assert_allclose(
        moved, moved_one, rtol=0, atol=TOLERANCE * scale, err_msg=path
      )
      if value.dtype.kind == "i":
        np.testing.assert_array_equal(after[path], value, err_msg=path)


def test_the_run_that_is_compared_does_something(stepped, start):
  after, told, _ = stepped("1x1x1")
  begun = tree.flatten(start)
  still = [p for p in begun if (after[0][p] == begun[p]).all()]
  # The teacher is a copy that starts as its model, and keeps the objectives' heads;
  # a key's bias moves all scores of a softmax alike. This step has no guard.
  assert all(p.startswith(("ema/", "guard/")) or p.endswith("key/bias") for p in still)
  assert after[1]["memory/objectives_itc/ptr"] == 0  # 2 batches of 8: once around
  ids = after[1]["memory/objectives_itc/id_queue"]
  np.testing.assert_array_equal(ids, np.tile(tiny.batch(BATCH)["image_id"], 2))
  assert told[0]["drawn"][2].all()


def parts_of(sharding):
  """Into how many different pieces a mesh of all eight devices cuts an array."""
  return len({str(index) for index in sharding.devices_indices_map((16,) * 8).values()})


@pytest.mark.parametrize("name", ["1x8x1", "2x2x2"])
def test_nothing_large_lies_whole_on_a_device(name):
  # Without compiling: shapes alone. AdamW, so that there are moments.
  module = tiny.albef(depth=1, queue=QUEUE)
  batch = like(tiny.batch(BATCH))
  shapes = step_lib.abstract_params(module, batch)
  tx, _ = optim_lib.make(optim_lib.Optim(weight_decay=0.1), shapes, total_steps=10)
  mesh, sharding = place(name)
  state = step_lib.abstract_state(
    module, tx, batch, ema=True, mesh=mesh, sharding=sharding
  )
  whole, split = {}, {}
  for path, leaf in tree.flatten(state).items():
    pieces = leaf.size // max(1, np.prod(leaf.sharding.shard_shape(leaf.shape)))
    (whole if pieces == 1 else split)[path] = leaf.shape
  params = {p for p in split if p.startswith("params/")}
  names = {p.removeprefix("params/") for p in params}
  assert {"model/image/blocks/mlp/up/kernel", "model/text/word/embedding"} <= names
  # What is made of a parameter lies as it does: both moments and the average.
  for path in params:
    inner = path.removeprefix("params/")
    copies = [p for p in split if p.endswith("/" + inner) and p != path]
    assert len(copies) == 3, (path, copies)
    mine = tree.flatten(state)[path].sharding
    assert all(tree.flatten(state)[p].sharding == mine for p in copies)
  for queue in ("image_queue", "text_queue", "id_queue"):
    assert f"memory/objectives_itc/{queue}" in split
  # What stays whole is small: vectors of biases, the temperature, 12 dimensions of
  # embeddings that 8 do not divide.
  largest = max(np.prod(shape, dtype=int) for shape in whole.values())
  assert largest <= 2 * 16 * 10, {p: s for p, s in whole.items() if np.prod(s) > 64}


@pytest.mark.parametrize("name", ["1x8x1", "2x2x2"])
def test_a_step_leaves_arrays_where_they_were(stepped, parts, name):
  module, tx, _ = parts
  mesh, sharding = place(name)
  where = step_lib.abstract_state(
    module,
    tx,
    like(tiny.batch(BATCH)),
    ema=True,
    mesh=mesh,
    sharding=sharding,
  )
  _, _, places = stepped(name)
  for path, leaf in tree.flatten(where).items():
    assert places[path].is_equivalent_to(leaf.sharding, leaf.ndim), path


def test_a_fresh_state_is_the_same_on_every_mesh(parts, fresh):
  module, tx, _ = parts
  mesh, sharding = place("2x2x2")
  batch = like(tiny.batch(BATCH))
  state = step_lib.init_state(
    module, tx, batch, seed=0, ema=True, mesh=mesh, sharding=sharding
  )
  for path, value in tree.flatten(state).items():
    np.testing.assert_allclose(
      value, tree.flatten(fresh)[path], rtol=1e-6, atol=1e-6, err_msg=path
    )


def test_a_frozen_tower_has_a_place_and_comes_back(tmp_path):
  # The optimiser keeps nothing of what it does not move: there is nothing to place.
  module, batch = tiny.albef(depth=1, queue=QUEUE), like(tiny.batch(BATCH))
  shapes = step_lib.abstract_params(module, batch)
  config = optim_lib.Optim(weight_decay=0.1, multipliers=(("^model/image/", 0.0),))
  tx, _ = optim_lib.make(config, shapes, total_steps=10)
  mesh, sharding = place("2x2x2")
  fields = dict(ema=True, mesh=mesh, sharding=sharding)
  where = step_lib.abstract_state(module, tx, batch, **fields)
  state = step_lib.init_state(module, tx, batch, seed=0, **fields)
  assert jax.tree.structure(state) == jax.tree.structure(where)
  moments = {p for p in tree.flatten(state) if re.search("^opt_state/.*/mu/", p)}
  assert moments and not any("/model/image/" in path for path in moments)

  # What such a state is saved as can be read back onto the mesh. That the optimiser
  # moves nothing frozen is a matter of test_optim.py.
  checkpoints = checkpoint_lib.Checkpoints(tmp_path)
  checkpoints.save(0, state, {"position": 0}, None)
  checkpoints.finish()
  again, _ = checkpoint_lib.Checkpoints(tmp_path).restore(where)
  assert jax.tree.structure(again) == jax.tree.structure(state)
  for path, value in tree.flatten(again).items():
    np.testing.assert_array_equal(value, tree.flatten(state)[path], err_msg=path)
