"""Programs that are compiled while other things are done."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.training import sharding as sharding_lib
from vlp_jax.training import stepping

SHARDING = sharding_lib.Sharding()


@pytest.fixture
def told():
  """JAX logs what it compiles, in all threads."""
  jax.config.update("jax_log_compiles", True)
  yield
  jax.config.update("jax_log_compiles", False)


@pytest.fixture(scope="module")
def mesh():
  return sharding_lib.make_mesh(SHARDING)


def step(state, batch):
  # The mesh of the thread that compiles is that of the run.
  assert jax.sharding.get_abstract_mesh().shape["data"] == 8
  return state + batch["x"].sum(), state


def reading(**sizes):
  """Of one kind of data, with such columns."""
  batch = {k: jax.ShapeDtypeStruct((v,), jnp.float32) for k, v in sizes.items()}
  return (stepping.Reading("", 1.0, batch),)


def compilations(caplog):
  lines = [record.getMessage() for record in caplog.records]
  return sum("Finished XLA compilation of jit(step)" in line for line in lines)


def test_a_step_is_compiled_once_and_ahead(mesh, caplog, told):
  place = sharding_lib.replicated(mesh)
  state = jax.ShapeDtypeStruct((), jnp.float32, sharding=place)
  whole = stepping.Whole(step, state, reading(x=8), mesh)
  compiled = lambda: compilations(caplog)
  with caplog.at_level(logging.WARNING):
    with stepping.compiling(whole.programs, mesh, SHARDING):
      begun = jax.device_put(jnp.float32(1), place)
    assert compiled() == 1
    with sharding_lib.use(mesh, SHARDING):
      batch = sharding_lib.put_batch({"x": np.ones(8, np.float32)}, mesh)
      after, _ = whole(begun, batch)
  assert after == 9
  assert compiled() == 1


def test_of_several_kinds_each_step_has_its_program(mesh, caplog, told):
  """Compiled before the first step, not when the turn of a kind has come."""
  place = sharding_lib.replicated(mesh)
  state = jax.ShapeDtypeStruct((), jnp.float32, sharding=place)
  one = lambda size: {"x": jax.ShapeDtypeStruct((size,), jnp.float32)}
  readings = (
    stepping.Reading("pairs", 0.75, {"pairs": one(8)}),
    stepping.Reading("images+texts", 0.25, {"images": one(8), "texts": one(16)}),
  )

  def step(state, batch):
    return state + sum(jax.tree.leaves(jax.tree.map(jnp.sum, batch))), state

  whole = stepping.Whole(step, state, readings, mesh)
  assert [p.name for p in whole.programs] == ["step pairs", "step images+texts"]
  assert [p.times for p in whole.programs] == [0.75, 0.25]
  with caplog.at_level(logging.WARNING):
    with stepping.compiling(whole.programs, mesh, SHARDING):
      now = jax.device_put(jnp.float32(0), place)
    assert compilations(caplog) == 2
    ones = lambda size: {"x": np.ones(size, np.float32)}
    for given in (
      {"pairs": ones(8)},
      {"images": ones(8), "texts": ones(16)},
      {"pairs": ones(8)},
    ):
      now, _ = whole(now, sharding_lib.put_batch(given, mesh))
  assert now == 8 + 24 + 8
  assert compilations(caplog) == 2


def test_the_host_is_at_most_one_step_ahead():
  def slow(state, batch):
    # The loop's length is not known when it is compiled, so it is not left out.
    wave = lambda _, x: jnp.sin(x + batch["x"][0])
    return state, jax.lax.fori_loop(0, jnp.int32(state), wave, jnp.ones(2**20))[0]

  alone = sharding_lib.make_mesh(SHARDING, jax.devices()[:1])
  place = sharding_lib.replicated(alone)
  state = jax.ShapeDtypeStruct((), jnp.float32, sharding=place)
  whole = stepping.Whole(slow, state, reading(x=1), alone)
  now = jax.device_put(jnp.float32(100), place)
  batch = sharding_lib.put_batch({"x": np.ones(1, np.float32)}, alone)
  seen = []
  for _ in range(3):
    now, metric = whole(now, batch)
    seen.append(metric)
    assert all(before.is_ready() for before in seen[:-1])


def test_what_cannot_be_compiled_is_told(mesh):
  def broken(x):
    raise ValueError("no such step")

  x = jax.ShapeDtypeStruct((), jnp.float32)
  programs = [stepping.Program("step", jax.jit(broken), (x,))]
  with pytest.raises(ValueError, match="no such step"):
    with stepping.compiling(programs, mesh, SHARDING):
      pass
  with pytest.raises(KeyError, match="of the body"):
    with stepping.compiling(programs, mesh, SHARDING):
      raise KeyError("of the body")
