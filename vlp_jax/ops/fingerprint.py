"""A number that knows an array's every bit, however the array is laid out."""

import math

import jax
from jax import lax
import jax.numpy as jnp


def of(x: jax.Array) -> jax.Array:
  """uint32 []: the same for the same bits, on any mesh; another for other ones.

  Adds up, mod 2^32, every word of x mixed with its place. Mixing is one to one, so one
  word that changes always changes the sum; when more of them do, they go unseen with a
  chance of 2^-32. Sums of integers do not depend on their order, so the array is never
  gathered; and nothing leaves the device but the sum.
  """
  words = _words(x)
  place = jnp.zeros(words.shape, jnp.uint32)
  stride = 1
  for axis in reversed(range(words.ndim)):
    row = lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    place = place + row * jnp.uint32(stride % 2**32)
    stride *= words.shape[axis]
  shape = jnp.uint32((math.prod(x.shape) * 2654435761) % 2**32)
  return jnp.sum(_mixed(words ^ _mixed(place)), dtype=jnp.uint32) + shape


def _words(x):
  """The bits of x as uint32, one or two of them a number."""
  x = jnp.asarray(x)
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint32)
  kind = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
  return lax.bitcast_convert_type(x, kind).astype(jnp.uint32)


def _mixed(n):
  """uint32 -> uint32, one to one, near ones far apart (the end of MurmurHash3)."""
  n = (n ^ (n >> 16)) * jnp.uint32(0x85EBCA6B)
  n = (n ^ (n >> 13)) * jnp.uint32(0xC2B2AE35)
  return n ^ (n >> 16)
