"""The step: what it draws, in which order it moves things, and what it tells."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import tiny
from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.ops import reduce
from vlp_jax.ops import tree
from vlp_jax.training import optim as optim_lib
from vlp_jax.training import sharding as sharding_lib
from vlp_jax.training import step as step_lib

DECAY, LR, BATCH = 0.75, 0.5, 4


class Line:
  """The smallest pretrainer: loss = mean(a - teacher's a)^2 + noise, and a counter."""

  shares = types.MappingProxyType({})

  def init(self, rngs, batch):
    return {"params": {"a": jnp.ones(3)}, "memory": {"seen": jnp.int32(0)}}

  def apply(self, variables, batch, *, step, teacher_params, train, rngs, mutable):
    assert train and list(mutable) == ["memory"]
    params = variables["params"]
    loss = 0.5 * jnp.sum(jnp.square(params["a"] - batch["x"]))
    one = jnp.float32(1.0)
    metrics = {name: reduce.Mean(jax.random.uniform(rngs[name]), one) for name in rngs}
    if teacher_params is not None:
      metrics["teacher"] = reduce.Mean(teacher_params["a"][0], one)
    memory = {"seen": variables["memory"]["seen"] + batch["x"].shape[0]}
    return (reduce.Mean(loss, one), metrics), {"memory": memory}


def run(steps=3, *, seed=0, ema_decay=DECAY):
  """(state after each step, metrics of each step) of SGD on `Line`."""
  tx = optax.sgd(LR)
  init = step_lib.make_init(Line(), tx, ema=ema_decay is not None)
  state = init(jax.random.key(seed), None)
  take = step_lib.make_train_step(
    Line(), tx, seed=seed, ema_decay=ema_decay, schedule=lambda step: LR / (1 + step)
  )
  take = jax.jit(take)
  states, told = [state], []
  for _ in range(steps):
    state, metrics = take(state, {"x": jnp.zeros(3)})
    states.append(state)
    told.append({name: float(mean.value()) for name, mean in metrics.items()})
  return states, told


def test_the_teacher_is_updated_first_from_what_came_in():
  # salesforce/ALBEF models/model_pretrain.py: _momentum_update comes before the loss,
  # and the optimiser after it.
  states, told = run()
  average, params = 1.0, 1.0
  for state, metrics in zip(states[1:], told, strict=True):
    average = DECAY * average + (1 - DECAY) * params
    assert metrics["teacher"] == pytest.approx(average)
    assert float(state.ema["a"][0]) == pytest.approx(average)
    params = params - LR * params
    assert float(state.params["a"][0]) == pytest.approx(params)


def test_without_a_teacher_there_is_none():
  states, told = run(ema_decay=None)
  assert states[-1].ema is None
  assert "teacher" not in told[0]


def test_what_is_told_is_of_the_parameters_that_came_in():
  _, told = run(2)
  assert told[0]["loss"] == pytest.approx(1.5)
  assert told[0]["grad_norm"] == pytest.approx(np.sqrt(3))
  assert told[1]["grad_norm"] == pytest.approx(np.sqrt(3) / 2)
  assert [metrics["learning_rate"] for metrics in told] == [LR, LR / 2]


def test_counters_and_memory_go_on():
  states, _ = run(3)
  assert [int(state.step) for state in states] == [0, 1, 2, 3]
  assert [int(state.memory["seen"]) for state in states] == [0, 3, 6, 9]


def test_draws_are_a_function_of_seed_step_and_stream():
  drawn = lambda told: [[metrics[s] for s in step_lib.STREAMS] for metrics in told]
  first = drawn(run(3)[1])
  assert first == drawn(run(3)[1])
  flat = [x for step in first for x in step]
  assert len(set(flat)) == len(flat)
  assert not set(flat) & {x for step in drawn(run(3, seed=1)[1]) for x in step}


def test_a_stream_keeps_its_draws_when_another_one_is_added(monkeypatch):
  before = step_lib.keys(0, jnp.int32(5))
  monkeypatch.setattr(step_lib, "STREAMS", (*step_lib.STREAMS, "new"))
  after = step_lib.keys(0, jnp.int32(5))
  for name, key in before.items():
    assert (jax.random.key_data(key) == jax.random.key_data(after[name])).all()


def test_shapes_places_and_values_take_one_trace_of_the_model(monkeypatch):
  traced, call = [], pretrainer_lib.Pretrainer.__call__

  def counted(self, *args, **fields):
    traced.append(self)
    return call(self, *args, **fields)

  monkeypatch.setattr(pretrainer_lib.Pretrainer, "__call__", counted)
  module, batch = tiny.albef(depth=1), tiny.batch(BATCH)
  shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}
  mesh = sharding_lib.make_mesh(
    sharding_lib.Sharding(mesh={"data": 1}), jax.devices()[:1]
  )
  fields = dict(mesh=mesh, sharding=sharding_lib.Sharding(), ema=True)
  params = step_lib.abstract_params(module, shapes)
  tx, _ = optim_lib.make(optim_lib.Optim(), params, total_steps=10)
  where = step_lib.abstract_state(module, tx, shapes, **fields)
  step_lib.init_state(module, tx, shapes, seed=0, where=where, **fields)
  assert len(traced) == 1
  # Another model of the same fields is another one.
  step_lib.abstract_params(tiny.albef(depth=1), shapes)
  assert len(traced) == 2


def test_a_fresh_teacher_is_its_model():
  module, batch = tiny.albef(depth=1), tiny.batch(BATCH)
  shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}
  mesh = sharding_lib.make_mesh(
    sharding_lib.Sharding(mesh={"data": 1}), jax.devices()[:1]
  )
  tx, _ = optim_lib.make(
    optim_lib.Optim(), step_lib.abstract_params(module, shapes), total_steps=10
  )
  fields = dict(mesh=mesh, sharding=sharding_lib.Sharding(), ema=True)
  state = step_lib.init_state(module, tx, shapes, seed=0, **fields)
  own, average = tree.flatten(state.params), tree.flatten(state.ema)
  assert own.keys() == average.keys()
  for path in own:
    np.testing.assert_array_equal(own[path], average[path], err_msg=path)
  where = step_lib.abstract_state(module, tx, shapes, **fields)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), where) == jax.tree.map(
    lambda x: (x.shape, x.dtype), state
  )
