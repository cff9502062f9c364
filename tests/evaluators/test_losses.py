"""Held-out losses of the real objectives."""

import jax
import numpy as np
import pytest

from tests import tiny
from vlp_jax.evaluators import losses


@pytest.fixture(scope="module")
def albef():
  module = tiny.albef()
  return module, tiny.init(module, tiny.batch(4))["params"]


def evaluator(monkeypatch, module, batches, **fields):
  monkeypatch.setattr(losses.evaluation, "eval_pairs", lambda *a, **k: iter(batches))
  made = losses.Evaluator(**fields)
  made.setup(
    pretrainer=module, source=None, tokenizer=None, pp="", mesh=None, batch_size=4
  )
  return made


def batch(seed, valid=4):
  return tiny.batch(4, seed=seed) | {"valid": np.arange(4) < valid}


def test_means_over_full_batches_without_queue_and_teacher(monkeypatch, albef):
  module, params = albef
  both = evaluator(monkeypatch, module, [batch(0), batch(1), batch(2, valid=3)])(
    {"params": params}
  )
  first = evaluator(monkeypatch, module, [batch(0)])({"params": params})
  assert {"loss", "itc", "itm", "mlm", "itm/accuracy"} <= set(both)
  assert both["loss"] == pytest.approx(both["itc"] + both["itm"] + both["mlm"], rel=0.1)
  assert all(np.isfinite(v) for v in both.values()) and both["loss"] != first["loss"]

  bare = tiny.albef(queue=0, distill=0.0)
  images = [tiny.batch(4, seed=s) for s in (0, 1)]
  apply = jax.jit(lambda b: bare.apply({"params": params}, b, rngs=tiny.rngs())[1])
  want = [apply(b)["itc"] for b in images]
  # Two batches of one size: the mean of their means. float32 sums in another order.
  np.testing.assert_allclose(both["itc"], np.mean([m.value() for m in want]), rtol=1e-5)


def test_every_evaluation_draws_the_same(monkeypatch, albef):
  module, params = albef
  made = evaluator(monkeypatch, module, [batch(0)])
  first = made({"params": params})
  made = evaluator(monkeypatch, module, [batch(0)])
  assert made({"params": params}) == first
  other = evaluator(monkeypatch, module, [batch(0)], seed=1)({"params": params})
  assert other["mlm"] != first["mlm"] and other["itc"] == first["itc"]


def test_too_few_examples_for_a_batch(monkeypatch, albef):
  module, params = albef
  made = evaluator(monkeypatch, module, [batch(0, valid=2)])
  with pytest.raises(ValueError, match="fewer than batch_size=4"):
    made({"params": params})
