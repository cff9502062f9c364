"""The written-out threefry draws what JAX's own draws."""

import jax
from jax.extend import random as extend
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.ops import prng

SEEDS = (0, 1, 2**31 - 1, -1)


def own(seed):
  return jax.random.key(seed, impl="threefry2x32")


def same(got, want):
  if jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
    got, want = jax.random.key_data(got), jax.random.key_data(want)
  assert got.dtype == want.dtype
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("seed", SEEDS)
def test_keys(seed):
  same(prng.key(seed), own(seed))
  for data in (0, 7, 2**32 - 1):
    folded = jax.random.fold_in(prng.key(seed), jnp.uint32(data))
    same(folded, jax.random.fold_in(own(seed), jnp.uint32(data)))
  for number in (1, 2, 5, (2, 3)):
    same(jax.random.split(prng.key(seed), number), jax.random.split(own(seed), number))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4), (0,)])
@pytest.mark.parametrize("bits", ["uint8", "uint16", "uint32"])
def test_bits(shape, bits):
  got = jax.random.bits(prng.key(3), shape, bits)
  same(got, jax.random.bits(own(3), shape, bits))


@pytest.mark.parametrize(
  "draw",
  [
    lambda key: jax.random.normal(key, (3, 5)),
    lambda key: jax.random.normal(key, (3, 5), jnp.bfloat16),
    lambda key: jax.random.truncated_normal(key, -2, 2, (4,)),
    lambda key: jax.random.randint(key, (9,), -4, 11),
    lambda key: jax.random.categorical(key, jnp.zeros((4, 6))),
    lambda key: jax.random.bernoulli(key, 0.3, (20,)),
    lambda key: jax.random.permutation(key, 11),
  ],
)
def test_what_is_drawn(draw):
  same(jax.jit(draw)(prng.key(5)), jax.jit(draw)(own(5)))


def test_a_row_of_keys():
  draw = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 2), (3,)))
  same(draw(jax.random.split(prng.key(1), 4)), draw(jax.random.split(own(1), 4)))


def test_split_over_devices():
  mesh = jax.make_mesh((2, 4), ("a", "b"))
  place = jax.NamedSharding(mesh, jax.P("a", "b"))
  draw = lambda key: jax.random.uniform(key, (6, 8))
  same(jax.jit(draw, out_shardings=place)(prng.key(1)), draw(own(1)))


def test_more_than_32_bits_can_count(monkeypatch):
  """JAX draws them: here nothing is compiled."""
  asked = []

  def theirs(key, width, shape):
    asked.append(shape)
    return jnp.zeros(shape, f"uint{width}")

  impl = extend.threefry_prng_impl._replace(random_bits=theirs)
  monkeypatch.setattr(extend, "threefry_prng_impl", impl)
  for shape in [(2**16 - 1, 2**16), (2**16, 2**16), (2**17, 2**16)]:
    draw = jax.jit(lambda s=shape: jax.random.bits(prng.key(0), s, "uint32"))
    assert draw.lower().out_info.shape == shape
  assert asked == [(2**16, 2**16), (2**17, 2**16)]
