"""Threefry as `jax.random` computes it, bit for bit, written out for the compiler.

On CPUs JAX lowers its 20 rounds to a loop over whole arrays: each draw and each
`fold_in` is then some ten kernels to compile. Written out they are one, which takes a
quarter of the time to compile and a tenth to run.

XLA writes the rounds anew into each kernel that reads the bits: what several read, as a
mask of dropout forwards and backwards, goes through an optimization barrier.
"""

from collections.abc import Sequence
import functools
import math

import jax
from jax.extend import random as extend
import jax.numpy as jnp

# Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", table 2 and 4.1.
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def key(seed: int | jax.Array) -> jax.Array:
  """A typed key []; all that `jax.random` draws from it is as from its own threefry."""
  return jax.random.key(seed, impl=_WRITTEN_OUT)


def written_out(key: jax.Array) -> jax.Array:
  """The same key, whose draws are written out; of another generator as it is."""
  if jax.random.key_impl(key) != "threefry2x32":
    return key
  return jax.random.wrap_key_data(jax.random.key_data(key), impl=_WRITTEN_OUT)


@jax.jit  # Traced and lowered once for all draws of a shape.
def _threefry(key, x0, x1):
  """Threefry-2x32, 20 rounds. key: uint32 [2]; x0, x1: uint32, of one shape."""
  keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(_PARITY))
  x0, x1 = x0 + keys[0], x1 + keys[1]
  for i in range(5):
    for turn in _ROTATIONS[i % 2]:
      x0 = x0 + x1
      x1 = (x1 << jnp.uint32(turn)) | (x1 >> jnp.uint32(32 - turn))
      x1 = x0 ^ x1
    x0 = x0 + keys[(i + 1) % 3]
    x1 = x1 + keys[(i + 2) % 3] + jnp.uint32(i + 1)
  return x0, x1


def _count(shape: Sequence[int]):
  """The place of each number in its array, in row-major order: uint32, of `shape`."""
  count = jnp.zeros(shape, jnp.uint32)
  stride = 1
  for axis in reversed(range(len(shape))):
    along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    count, stride = count + along * jnp.uint32(stride), stride * shape[axis]
  return count


@functools.partial(jax.jit, static_argnums=1)
def _hashed(key, shape):
  """Two uint32 of `shape`; `shape` has under 2^32 numbers."""
  count = _count(shape)
  return _threefry(key, jnp.zeros_like(count), count)


def _keys(halves):
  """uint32 [..., 2], of two [...]; computed once, not for each number drawn."""
  return jax.lax.optimization_barrier(jnp.stack(halves, axis=-1))


def _split(key, shape):
  return _keys(_hashed(key, tuple(shape)))


def _random_bits(key, bit_width, shape):
  if math.prod(shape) >= 2**32 or bit_width == 64:
    # What counts with 64 bits, which JAX has only inside of its own.
    return extend.threefry_prng_impl.random_bits(key, bit_width, shape)
  x0, x1 = _hashed(key, tuple(shape))
  return (x0 ^ x1).astype(f"uint{bit_width}")


def _fold_in(key, data):
  seed = extend.threefry_prng_impl.seed(jnp.asarray(data, jnp.uint32))
  return _keys(_threefry(key, seed[0], seed[1]))


_WRITTEN_OUT = extend.define_prng_impl(
  key_shape=extend.threefry_prng_impl.key_shape,
  seed=extend.threefry_prng_impl.seed,
  split=_split,
  random_bits=_random_bits,
  fold_in=_fold_in,
  name="threefry2x32_written_out",
  tag="fryo",
)
