"""The order of examples, against TensorFlow's own shuffle of an index."""

import numpy as np
import pytest
import tensorflow as tf

from vlp_jax.data import shuffle


def theirs(positions, size, seed):
  epochs, at = positions // size, positions % size
  seeds = [np.full_like(epochs, seed), epochs, np.zeros_like(epochs)]
  moved = tf.raw_ops.RandomIndexShuffle(
    index=at,
    seed=np.stack(seeds, axis=1),
    max_index=tf.constant(size - 1, tf.int64),
    rounds=shuffle.ROUNDS,
  )
  return moved.numpy()


SIZES = (2, 3, 8, 257, 6_000, 2**16, 2**16 + 2, 10**6 + 3, 2**20, 4 * 10**8, 2**33 + 5)


@pytest.mark.parametrize("seed", [0, 7, 2**31 + 5])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_that_of_tensorflow(size, seed):
  some = min(size, 300)
  # The first and the last of an epoch, another epoch, and one of a very long run.
  parts = [np.arange(some), size - 1 - np.arange(some), 3 * size + np.arange(some)]
  positions = np.concatenate([*parts, [2**40]])
  found = shuffle.shuffled(positions, size, seed)
  assert found.dtype == np.int64
  np.testing.assert_array_equal(found, theirs(positions, size, seed))


@pytest.mark.parametrize("size", [2**16 + 1, 2**18 + 1])
def test_it_is_a_permutation_where_that_of_tensorflow_is_none(size):
  positions = np.arange(size)
  assert len(np.unique(theirs(positions, size, 0))) < size
  np.testing.assert_array_equal(
    np.sort(shuffle.shuffled(positions, size, 0)), positions
  )
