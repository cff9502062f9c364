"""Hidden regions find their places: against loops, and the rows that count in MLM."""

import jax
import numpy as np
import pytest

from tests import tiny
from vlp_jax.objectives import mlm
from vlp_jax.ops import region_match


def test_each_place_is_to_find_its_own_looks():
  rng = np.random.default_rng(0)
  looks, places = rng.normal(size=(2, 3, 5, 4)).astype(np.float32)
  pooled = rng.normal(size=(3, 4)).astype(np.float32)
  got = region_match.loss(looks, places, pooled)
  for b in range(3):
    losses = []
    for m in range(5):
      scores = [(places[b, m] + pooled[b]) @ looks[b, n] for n in range(5)]
      losses.append(np.log(np.sum(np.exp(scores))) - scores[m])
    np.testing.assert_allclose(got[b], np.mean(losses), rtol=1e-5)


def test_the_worst_rows_do_not_count():
  losses = np.array([[1.0, 2.0], [0.0, 0.5], [9.0, 0.0], [1.0, 0.0]], np.float32)
  np.testing.assert_array_equal(mlm.keep_best(losses, 0.75), [1, 1, 0, 1])
  np.testing.assert_array_equal(mlm.keep_best(losses, 0.5), [0, 1, 0, 1])


@pytest.mark.parametrize("name", ["smoothing", "drop_worst"])
@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_a_share_that_is_none(name, value):
  module = mlm.Objective(vocab=tiny.VOCAB, width=8, **{name: value})
  with pytest.raises(ValueError, match=rf"objectives.mlm.{name}={value}: a share"):
    module.bind({}).corrupt({})


def test_a_smoothed_target_costs_nothing_where_it_is_met():
  vocab = tiny.VOCAB
  module = mlm.Objective(vocab=vocab, width=8, smoothing=0.1)
  target = np.full(vocab.size, 0.1 / (vocab.size - 2), np.float64)
  target[vocab.pad], target[7] = 1e-30, 0.9
  logp = jax.numpy.asarray(np.log(target / target.sum()))[None, None]
  # Padding's own logarithm is left out of the sum by hand.
  got = module._smoothed(logp, -logp[..., 7])
  np.testing.assert_allclose(got, 0.0, atol=1e-4)
