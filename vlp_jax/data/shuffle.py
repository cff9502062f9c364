"""Which example stands at a position: a permutation without state.

By numpy, since the first batches do not wait until TensorFlow is there. It gives what
TensorFlow's RandomIndexShuffle does, of which earlier versions had the order; but where
an epoch is of 2^k + 1 examples, k even and 16 or more: there that op's block is short
of a bit, and it gives some indices twice, and others never.

A block cipher of 2 W bits, Simon (Beaulieu et al. 2013,
https://eprint.iacr.org/2013/404), of which TensorFlow takes a key of three words and
few rounds, is walked along from an index until it comes to another one of the range
(Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
"""

import functools

import numpy as np

# Of the cipher. TensorFlow's 4 leave data of a few thousand examples nearly in order
# (their correlation with it is 5 to 10 times that of chance), and 8 leave a trace in
# 60,000; after 16 none is found.
ROUNDS = 16
# Simon's sequence of bits z, from the least on, and its constant c.
BITS, CONSTANT = 0x7369F885192C0EF5, 0xFFFFFFFC
LEAST = 16  # bits of a block
LISTED = 2**LEAST  # up to so many indices, a permutation is made as a whole


def shuffled(
  positions: np.ndarray, size: int, seed: int, *, block: int = 1
) -> np.ndarray:
  """int64 [n]: the example at each position; every epoch is another permutation.

  Args:
    positions: int64 [n], 0 or more. size: examples of an epoch.
    block: runs of so many examples, which divides `size`, are moved as one.
  """
  positions = np.asarray(positions, np.int64)
  epochs, at = positions // size, positions % size
  if size == block:
    return at
  moved = np.empty_like(at)
  for epoch in np.unique(epochs):
    here = epochs == epoch
    moved[here] = _permuted(at[here] // block, size // block, (seed, int(epoch), 0))
  return moved * block + at % block


def _permuted(index, size, key):
  if size <= LISTED:
    return _listed(size, key)[index]
  bits = (size - 1).bit_length()
  keys = _round_keys((bits + bits % 2) // 2, key)
  index, left = index.astype(np.uint64), np.arange(len(index))
  while len(left):
    index[left] = _encrypted(index[left], keys)
    left = left[index[left] >= size]
  return index.astype(np.int64)


@functools.lru_cache(maxsize=8)
def _listed(size, key):
  """The whole permutation of `size` indices."""
  index = np.arange(LISTED, dtype=np.uint16)
  walk = _encrypted(index, _round_keys(LEAST // 2, key))
  # Each goes on from where it is as far as that one has come: twice as far each time.
  while (walk[:size] >= size).any():
    walk = np.where(walk >= size, walk[walk], walk)
  return walk[:size].astype(np.int64)


def _round_keys(width, key):
  """(bits W of a word, a key for each round)."""
  mask = 2**width - 1
  turn = lambda word, by: (word >> by | word << (width - by)) & mask
  keys, bits = [word & 0xFFFFFFFF & mask for word in key], BITS & mask
  while len(keys) < ROUNDS:
    last = turn(keys[-1], 3) ^ turn(keys[-1], 4)
    keys.append((CONSTANT & mask) ^ (bits & 1) ^ keys[-3] ^ last)
    bits >>= 1
  return width, keys


def _encrypted(index, keys):
  """[n] of fewer than 2 W bits -> others, in the type that they come in."""
  width, keys = keys
  # A word of 8 bits has a type of its own, in which nothing is to be cut off.
  word = np.uint8 if width == 8 else np.uint64
  mask = word(2**width - 1)
  turn = lambda x, by: (x << word(by) | x >> word(width - by)) & mask
  # To turn a word of 8 bits by 8 is to leave it.
  mixed = lambda x: turn(x, 1) & turn(x, 8 % width) ^ turn(x, 2)
  left = (index >> index.dtype.type(width)).astype(word)
  right = index.astype(word) & mask
  for one, other in zip(keys[::2], keys[1::2], strict=True):
    left = left ^ mixed(right) ^ word(one)
    right = right ^ mixed(left) ^ word(other)
  made = index.dtype.type
  return left.astype(made) << made(width) | right.astype(made)
