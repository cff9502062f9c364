"""Generators of many seeds, against numpy's own."""

import numpy as np
import pytest

from vlp_jax.data import generators

NUMBERS = np.array([0, 1, 7, 2**31, 2**32 - 1, 2**32, 2**40 + 3, 2**62], np.int64)


@pytest.mark.parametrize("first", [0, 1, 2**32 - 1, 2**32 + 5, 2**70])
@pytest.mark.parametrize("last", [0, 3])
def test_they_draw_what_numpy_draws(first, last):
  made = generators.default_rngs(first, NUMBERS, last)
  for number, rng in zip(NUMBERS.tolist(), made, strict=True):
    own = np.random.default_rng((first, number, last))
    assert rng.bit_generator.state == own.bit_generator.state
    # Half of a word that is left over from one seed is not the next one's.
    assert rng.integers(5, dtype=np.uint32) == own.integers(5, dtype=np.uint32)
    assert rng.uniform(0.2, 1.0) == own.uniform(0.2, 1.0)
    assert rng.standard_normal() == own.standard_normal()


def test_none_are_asked_for():
  assert not list(generators.default_rngs(0, np.zeros(0, np.int64), 0))
