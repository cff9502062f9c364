"""A fingerprint knows every bit and every place, and no mesh."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from vlp_jax.ops import fingerprint

print_of = jax.jit(fingerprint.of)


def plain(words, count):
  """In Python, word by word."""

  def mixed(n):
    n = (n ^ (n >> 16)) * 0x85EBCA6B % 2**32
    n = (n ^ (n >> 13)) * 0xC2B2AE35 % 2**32
    return n ^ (n >> 16)

  total = sum(mixed(int(word) ^ mixed(i)) for i, word in enumerate(words))
  return (total + count * 2654435761) % 2**32


@pytest.mark.parametrize("dtype", ["float32", "int32", "bfloat16", "uint8", "bool"])
def test_it_is_the_sum_of_words_by_place(dtype):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4, 2)) * 100, dtype)
  bits = {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
  assert int(print_of(x)) == plain(np.asarray(x).view(bits).ravel(), x.size)


def test_any_flipped_bit_changes_it():
  x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
  seen = {int(print_of(x))}
  words = x.view(np.uint32).ravel()
  one = [(place, bit) for place in range(x.size) for bit in range(32)]
  for flips in [*((f,) for f in one), *zip(one[31::32], one[63::32], strict=False)]:
    other = words.copy()
    for place, bit in flips:
      other[place] ^= np.uint32(1) << np.uint32(bit)
    seen.add(int(print_of(other.view(np.float32).reshape(x.shape))))
  # One bit anywhere, and the signs of two neighbours.
  assert len(seen) == 1 + 32 * x.size + x.size - 1


def test_places_count():
  x = np.arange(1, 9, dtype=np.float32)
  assert int(print_of(x)) != int(print_of(x[::-1].copy()))
  assert int(print_of(np.zeros(3, np.float32))) != int(
    print_of(np.zeros(4, np.float32))
  )


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_it_is_the_same_on_any_mesh(shape):
  x = np.random.default_rng(1).normal(size=(8, 4, 6)).astype(np.float32)
  mesh = jax.make_mesh(shape, ("a", "b", "c"))
  spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec(("a", "b"), "c")))
  assert int(print_of(spread)) == int(print_of(x))
