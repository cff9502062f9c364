"""Matching with half of the images replaced, alignment on the same pass, and heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.models import patches
from vlp_jax.models import text
from vlp_jax.models import vlm
from vlp_jax.models.fusion import merged
from vlp_jax.objectives import itm
from vlp_jax.objectives import mlm
from vlp_jax.objectives import pair_classify
from vlp_jax.objectives import text_rank
from vlp_jax.objectives import vqa_scores
from vlp_jax.objectives import wpa
from vlp_jax.ops import tree

WIDTH = 16
HALF = dict(width=WIDTH, negatives="random", layout="half")


def single_stream(types=3):
  sizes = dict(num_heads=2, mlp_dim=32, init_std=None)
  return vlm.VLM(
    image=patches.Encoder(width=WIDTH, patch=8, res=16, init_std=None),
    text=text.Encoder(tiny.VOCAB, WIDTH, 0, length=10, **sizes),
    fusion=merged.Fusion(WIDTH, WIDTH, depth=2, types=types, **sizes),
    embed_dim=None,
  )


def alone(objective):
  return pretrainer_lib.Pretrainer(single_stream(), {"it": objective}, {"it": 1.0})


OBJECTIVES = {
  "aligned": lambda: itm.Objective(**HALF, align=0.1),
  "mlm": lambda: mlm.Objective(tiny.VOCAB, WIDTH, rate=0.4, tied=False),
  "text_rank": lambda: text_rank.Objective(WIDTH, negatives=3),
}


@pytest.fixture(scope="module", params=list(OBJECTIVES))
def case(request):
  module = alone(OBJECTIVES[request.param]())
  return request.param, module, tiny.init(module, tiny.batch(8))


def test_losses_and_gradients(case):
  """Finite; nothing from under the padding; every parameter of use is reached."""
  name, module, variables = case
  run = lambda params, inputs: tiny.loss(module, {"params": params}, inputs)[0]
  inputs = tiny.batch(8)
  both = jax.jit(jax.value_and_grad(run))
  total, grads = both(variables["params"], inputs)
  assert total.shape == () and total.dtype == jnp.float32 and np.isfinite(total)
  noise = np.where(inputs["text_mask"], inputs["text"], 9).astype(np.int32)
  again, _ = both(variables["params"], inputs | {"text": noise})
  np.testing.assert_allclose(again, total, rtol=1e-5)
  norms = {path: float(jnp.abs(g).max()) for path, g in tree.flatten(grads).items()}
  # The words' matrix is not tied, masked words do not ask for the pooled pair, and a
  # key's bias moves nothing.
  silent = r"pool/" if name == "mlm" else "-"
  lacking = [
    path
    for path, norm in norms.items()
    if norm == 0 and silent not in path and "key/bias" not in path
  ]
  assert not lacking


def test_columns_of_tasks():
  assert vqa_scores.Objective(WIDTH, answers=7).columns(16) == {
    "answer_scores": ((7,), "float32")
  }
  assert pair_classify.Objective(WIDTH).columns(16) == {
    "image2": ((16, 16, 3), "uint8"),
    "label": ((), "int32"),
  }


def test_exactly_half_keep_their_image():
  module = itm.Objective(**HALF)
  ids = np.array([0, 0, 1, 2, 3, 4, 5], np.int32)
  draw = jax.jit(
    lambda seed: module.apply(
      {}, None, None, {"image_id": ids}, None, method="replace", rngs=tiny.rngs(seed)
    )
  )
  seen = set()
  for seed in range(4):
    rows, labels, found = map(np.asarray, draw(seed))
    assert labels.sum() == 3 and found.all()
    np.testing.assert_array_equal(rows[labels == 1], np.nonzero(labels == 1)[0])
    assert (ids[rows] != ids)[labels == 0].all()
    seen.add(tuple(labels))
  assert len(seen) > 1


def test_a_batch_of_one_has_nothing_to_replace_with():
  module = alone(itm.Objective(**HALF, align=0.1))
  inputs = tiny.batch(1)
  variables = tiny.init(module, inputs)
  total, (metrics, _) = tiny.loss(module, variables, inputs)
  assert total == 0 and metrics["it"].weight == 0


def test_alignment_is_added_with_its_weight():
  inputs = tiny.batch(8)
  plain, aligned = (alone(itm.Objective(**HALF, align=a)) for a in (0.0, 0.5))
  variables = tiny.init(plain, inputs)
  want, _ = tiny.loss(plain, variables, inputs)
  got, (metrics, _) = tiny.loss(aligned, variables, inputs)
  np.testing.assert_allclose(got, want + 0.5 * metrics["it/wpa"].value(), rtol=1e-5)


def test_words_are_what_lies_between_the_ends():
  mask = jnp.arange(6) < jnp.array([[6], [3], [1]])
  want = [[0, 1, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
  np.testing.assert_array_equal(wpa.words_of(mask), np.array(want, bool))


@pytest.mark.parametrize("layout", ["half", "triples"])
def test_alignment_wants_tokens_of_the_image(layout):
  objective = itm.Objective(**HALF | dict(layout=layout), align=0.1)
  module = pretrainer_lib.Pretrainer(tiny.model(), {"it": objective}, {"it": 1.0})
  with pytest.raises(ValueError, match='type="merged" or "co_attention"'):
    tiny.init(module, tiny.batch(4))


def test_hard_negatives_want_a_contrastive_space():
  with pytest.raises(ValueError, match="embed_dim=None"):
    tiny.init(alone(itm.Objective(width=WIDTH)), tiny.batch(4))
