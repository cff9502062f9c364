"""ITM accuracy with a head whose answers are known."""

import numpy as np
import pytest

from tests.evaluators import fakes
from vlp_jax.evaluators import itm

SHADES = (10, 40, 80, 90, 100, 140, 170, 200, 230)


def evaluator(source=None, near=0.5, batch_size=4, **fields):
  made = itm.Evaluator(**fields)
  made.setup(
    pretrainer=fakes.pretrainer(itm=fakes.Itm(near)),
    source=source or fakes.Source(SHADES, captions=2),
    tokenizer=fakes.Tokenizer(),
    pp=fakes.PP,
    mesh=None,
    batch_size=batch_size,
  )
  return made


def test_a_right_head_is_right_about_all():
  got = evaluator()(fakes.variables())
  assert got == {
    "accuracy": 100.0,
    "accuracy_hard": 100.0,
    "true": 100.0,
    "random": 100.0,
    "hard": 100.0,
  }


def test_a_lenient_head_falls_for_the_similar_caption():
  # Within 15 shades: only 80, 90 and 100 have a neighbour so near.
  got = evaluator(near=15.0)(fakes.variables())
  assert got["true"] == 100.0 and got["random"] > got["hard"]
  assert got["hard"] == pytest.approx(100 * 6 / 9)
  assert got["accuracy_hard"] == pytest.approx((100 + 100 * 6 / 9) / 2)


def test_a_head_that_says_yes_is_half_right():
  got = evaluator(near=999.0)(fakes.variables())
  assert got["accuracy"] == got["accuracy_hard"] == 50.0


def test_numbers_do_not_depend_on_batches():
  got = [
    evaluator(near=60.0, batch_size=b, pairs=p)(fakes.variables())
    for b, p in ((1, 1), (4, 5), (32, 64))
  ]
  assert got[0] == got[1] == got[2]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ids", [range(7), [0, 0, 1, 2, 3, 3], [5, 5, 6, 6], [1, 2]])
def test_a_mismatch_is_another_image_and_each_is_taken_once(ids, seed):
  ids = np.array(ids)
  other = itm.mismatch(ids, seed)
  assert (ids[other] != ids).all()
  np.testing.assert_array_equal(np.sort(other), np.arange(len(ids)))
  np.testing.assert_array_equal(other, itm.mismatch(ids, seed))


def test_seeds_differ():
  assert (itm.mismatch(np.arange(50), 0) != itm.mismatch(np.arange(50), 1)).any()


def test_one_image_has_no_mismatch():
  with pytest.raises(ValueError, match="3 of 4 examples are of one image"):
    itm.mismatch(np.array([1, 1, 1, 2]), 0)


def test_an_objective_that_is_not_there():
  with pytest.raises(ValueError, match=r"evals \(itm\): objective=\"match\""):
    evaluator(objective="match")
