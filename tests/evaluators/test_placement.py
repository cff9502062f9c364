"""Compiled functions over host batches."""

import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.evaluators import placement


def test_every_batch_and_every_result_is_told():
  place = placement.of(None, 2)
  double = place.jit(lambda scale, x: scale * x)
  told = []

  def batches():
    for i in range(3):
      told.append(f"read {i}")
      yield i, (jnp.full(2, i, jnp.float32),)

  with placement.telling(lambda: told.append("told")):
    for note, result in place.run(double, 2.0, batches()):
      np.testing.assert_array_equal(result, [2.0 * note] * 2)
      told.append(f"got {note}")
  # The next one is read while one is computed.
  assert told == (
    "read 0,told,read 1,told,told,got 0,read 2,told,told,got 1,told,got 2".split(",")
  )
  # Nobody is told any more, also where it ends by an error.
  with pytest.raises(ValueError), placement.telling(lambda: told.append("told")):
    raise ValueError
  del told[:]
  assert len(list(place.run(double, 2.0, batches()))) == 3
  assert told == ["read 0", "read 1", "read 2"]
