"""Means and trees."""

import jax.numpy as jnp
import numpy as np

from vlp_jax.ops import reduce
from vlp_jax.ops import schedule
from vlp_jax.ops import tree


def test_mean_ignores_what_weighs_nothing():
  got = reduce.Mean.of(jnp.array([1.0, jnp.nan, 3.0]), jnp.array([1.0, 0.0, 1.0]))
  assert got.value() == 2.0 and got.weight == 2.0


def test_means_of_unequal_parts_add_up_to_the_mean_of_the_whole():
  values = np.arange(10.0)
  whole = reduce.Mean.of(values)
  parts = reduce.Mean.of(values[:3]) + reduce.Mean.of(values[3:])
  np.testing.assert_allclose(parts.value(), whole.value())


def test_mean_of_nothing_is_zero():
  assert reduce.Mean.of(jnp.ones(3), jnp.zeros(3)).value() == 0.0


def test_tree_paths():
  got = tree.flatten({"a": {"b": jnp.ones(2)}, "c": [jnp.zeros(3)]})
  assert list(got) == ["a/b", "c/0"] and tree.size(got) == 5


def test_ramp():
  steps = [schedule.ramp(jnp.int32(s), 0.4, 10) for s in (0, 5, 10, 99)]
  np.testing.assert_allclose(steps, [0.0, 0.2, 0.4, 0.4], rtol=1e-6)
  assert schedule.ramp(jnp.int32(0), 0.4, 0) == np.float32(0.4)
