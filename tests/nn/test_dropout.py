"""Dropout is Flax's, number for number, of fewer kernels."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.nn import dropout as dropout_lib
from vlp_jax.ops import prng


class Net(nn.Module):
  """Two of them, one inside of a scan, by the class that is asked for."""

  kind: type

  @nn.compact
  def __call__(self, x):
    x = self.kind(0.3)(x, deterministic=False)
    layer = lambda net, x, _: (self.kind(0.1)(jnp.sin(x), deterministic=False), None)
    scan = nn.scan(
      layer, variable_axes={"params": 0}, split_rngs={"dropout": True}, length=3
    )
    return scan(self, x, None)[0]


class Dropout(nn.Dropout):
  """Flax's, under the name by which keys are drawn."""


def of(kind, key, x):
  def loss(x):
    return jnp.sum(jnp.cos(Net(kind).apply({}, x, rngs={"dropout": key})))

  return jax.jit(jax.value_and_grad(loss))(x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_flaxs_in_value_and_gradient(dtype):
  x = jnp.linspace(-3, 3, 7 * 11).reshape(7, 11).astype(dtype)
  want = of(Dropout, jax.random.key(3), x)
  for key in (jax.random.key(3), prng.key(3)):
    got = of(dropout_lib.Dropout, key, x)
    for a, b in zip(got, want, strict=True):
      assert a.dtype == b.dtype
      np.testing.assert_array_equal(a, b)
  # Something is dropped, and not all.
  assert 0 < jnp.sum(want[1] == 0) < x.size


def test_another_generator_is_asked_itself():
  key = jax.random.key(3, impl="rbg")
  x = jnp.ones((5, 9))
  rngs = {"dropout": key}
  got = dropout_lib.Dropout(0.5).apply({}, x, deterministic=False, rngs=rngs)
  want = Dropout(0.5).apply({}, x, deterministic=False, rngs=rngs)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_none_and_all(rate):
  x = jnp.ones((2, 3))
  got = dropout_lib.Dropout(rate).apply(
    {}, x, deterministic=False, rngs={"dropout": jax.random.key(0)}
  )
  np.testing.assert_array_equal(got, x * (1 - rate))
  same = dropout_lib.Dropout(rate).apply({}, x, deterministic=True)
  assert same is x


def test_a_tpu_makes_the_mask_where_it_is_read(monkeypatch):
  x = jnp.linspace(-3, 3, 77).reshape(7, 11)
  want = of(Dropout, jax.random.key(3), x)
  barrier = "optimization_barrier"
  draw = lambda x: of(dropout_lib.Dropout, jax.random.key(3), x)
  assert barrier in jax.jit(draw).lower(x).as_text()
  monkeypatch.setattr(dropout_lib.axes, "platform", lambda: "tpu")
  jax.tree.map(np.testing.assert_array_equal, draw(x), want)
  assert barrier not in jax.jit(lambda x: draw(x)).lower(x).as_text()


def test_the_mask_is_drawn_without_a_loop():
  def compiled(kind, key):
    draw = lambda key, x: kind(0.5).apply(
      {}, x, deterministic=False, rngs={"dropout": key}
    )
    return jax.jit(draw).lower(key, jnp.ones((8, 16))).compile().as_text()

  assert " while(" in compiled(Dropout, jax.random.key(0))  # on a CPU
  assert " while(" not in compiled(dropout_lib.Dropout, prng.key(0))
