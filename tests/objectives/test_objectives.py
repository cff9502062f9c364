"""The contract every objective keeps, and what each promises beside it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.nn import ask
from vlp_jax.objectives import itc
from vlp_jax.objectives import itm
from vlp_jax.objectives import mlm
from vlp_jax.ops import tree

WIDTH = 16
OBJECTIVES = {
  "itc": lambda: itc.Objective(),
  "itc_queue": lambda: itc.Objective(queue=16, distill=0.4),
  "itc_sigmoid": lambda: itc.Objective(loss="sigmoid"),
  "itm_hard": lambda: itm.Objective(width=WIDTH),
  "itm_random": lambda: itm.Objective(width=WIDTH, negatives="random"),
  "mlm": lambda: mlm.Objective(vocab=tiny.VOCAB, width=WIDTH, rate=0.4),
  "mlm_distill": lambda: mlm.Objective(
    vocab=tiny.VOCAB, width=WIDTH, rate=0.4, distill=0.4, whole_word=True, max_masked=6
  ),
}


def alone(name, **fields):
  return pretrainer_lib.Pretrainer(
    tiny.model(**fields), {"it": OBJECTIVES[name]()}, {"it": 1.0}
  )


def teacher_of(params):
  """Another tree than the live one, so that mixing the two up is seen."""
  return jax.tree.map(
    lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), params
  )


@pytest.fixture(scope="module", params=list(OBJECTIVES))
def case(request):
  module = alone(request.param)
  inputs = tiny.batch(8)
  variables = tiny.init(module, inputs)
  return request.param, module, variables, inputs


def test_losses_are_finite_float32_and_sane(case):
  name, module, variables, inputs = case
  total, (metrics, _) = tiny.loss(
    module, variables, inputs, teacher=teacher_of(variables["params"])
  )
  assert total.dtype == jnp.float32 and total.shape == ()
  guess = {"itc": np.log(8), "itm": np.log(2), "mlm": np.log(tiny.VOCAB.size)}
  want = guess[name.split("_")[0]]
  if name not in ("itc_sigmoid", "itc_queue"):
    assert 0.3 * want < total < 4 * want
  for mean in metrics.values():
    assert mean.total.dtype == jnp.float32 and np.isfinite(mean.value())


def test_bf16_compute_gives_a_float32_loss_nearby(case):
  name, module, variables, inputs = case
  teacher = teacher_of(variables["params"])
  half = alone(name, dtype="bfloat16")
  want, _ = tiny.loss(module, variables, inputs, teacher=teacher)
  got, _ = tiny.loss(half, variables, inputs, teacher=teacher)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, rtol=0.05)


def test_what_stands_under_padding_changes_nothing(case):
  _, module, variables, inputs = case
  teacher = teacher_of(variables["params"])
  noise = np.where(inputs["text_mask"], inputs["text"], 9).astype(np.int32)
  want, _ = tiny.loss(module, variables, inputs, teacher=teacher)
  got, _ = tiny.loss(module, variables, inputs | {"text": noise}, teacher=teacher)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_gradients_reach_what_they_should(case):
  name, module, variables, inputs = case
  teacher = teacher_of(variables["params"])

  def run(params, teacher):
    return tiny.loss(module, variables | {"params": params}, inputs, teacher=teacher)[0]

  both = jax.jit(jax.grad(run, argnums=(0, 1)))
  grad, teacher_grad = both(variables["params"], teacher)
  assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(teacher_grad))
  norms = {path: float(jnp.abs(g).max()) for path, g in tree.flatten(grad).items()}
  assert norms["model/image/patch/kernel"] > 0
  assert norms["model/text/word/embedding"] > 0
  # A fusion stack that no objective calls has no parameters.
  fused = norms.get("model/fusion/blocks/cross/value/kernel", 0) > 0
  projected = norms["model/image_proj/kernel"] > 0
  assert (fused, projected) == ((False, True) if "itc" in name else (True, False))
  heads = {path for path in norms if path.startswith("objectives_it/")}
  assert all(norms[path] > 0 for path in heads)


def test_same_key_same_loss(case):
  _, module, variables, inputs = case
  teacher = teacher_of(variables["params"])
  a, _ = tiny.loss(module, variables, inputs, teacher=teacher, seed=3)
  b, _ = tiny.loss(module, variables, inputs, teacher=teacher, seed=3)
  assert a == b


@pytest.mark.parametrize("name", ["itc", "itc_sigmoid"])
def test_permuting_the_batch_permutes_the_loss(name):
  module = alone(name)
  inputs = tiny.batch(8)
  variables = tiny.init(module, inputs)
  order = np.random.default_rng(0).permutation(8)
  want, _ = tiny.loss(module, variables, inputs)
  got, _ = tiny.loss(module, variables, {k: v[order] for k, v in inputs.items()})
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_queue_fills_in_order_and_keeps_its_length():
  module = alone("itc_queue")
  inputs = tiny.batch(8)
  variables = tiny.init(module, inputs)
  memory = variables["memory"]["objectives_it"]
  assert (memory["id_queue"] == -1).all() and memory["ptr"] == 0
  np.testing.assert_allclose(
    jnp.linalg.norm(memory["image_queue"], axis=1), 1, rtol=1e-5
  )
  teacher = teacher_of(variables["params"])
  for step in range(3):
    ids = inputs["image_id"] + 1000 * step
    _, (_, new) = tiny.loss(
      module, variables, inputs | {"image_id": ids}, teacher=teacher
    )
    variables = variables | new
  memory = variables["memory"]["objectives_it"]
  assert memory["ptr"] == 8
  np.testing.assert_array_equal(memory["id_queue"][:8], inputs["image_id"] + 2000)
  np.testing.assert_array_equal(memory["id_queue"][8:], inputs["image_id"] + 1000)


def test_an_image_that_comes_back_is_a_positive_in_the_queue():
  """With image ids, an earlier embedding of the same image is no negative."""
  module = alone("itc_queue")
  inputs = tiny.batch(8)
  variables = tiny.init(module, inputs)
  teacher = variables["params"]
  _, (_, new) = tiny.loss(module, variables, inputs, teacher=teacher)
  teacher = teacher_of(teacher)  # else the queued row is the batch's own once more
  again, _ = tiny.loss(module, variables | new, inputs, teacher=teacher)
  other = inputs | {"image_id": inputs["image_id"] + 1000}
  stranger, _ = tiny.loss(module, variables | new, other, teacher=teacher)
  assert not np.isclose(again, stranger)


def test_two_captions_of_an_image_are_no_negatives_of_each_other():
  module = alone("itm_hard")
  inputs = tiny.batch(8)
  inputs["image_id"] = np.repeat(np.arange(4, dtype=np.int32), 2)
  variables = tiny.init(module, inputs)

  def mined(m, batch):
    enc = pretrainer_lib.encode(m.model, ask.Live(), batch, jnp.int32(0))
    return m.objectives["it"].mine(m.model, enc, batch, None)

  draw = jax.jit(
    lambda seed: module.apply(variables, batch, method=mined, rngs=tiny.rngs(seed))
  )
  batch = {k: jnp.asarray(v) for k, v in inputs.items()}
  for seed in range(20):
    image_of_text, text_of_image, found = draw(seed)
    assert found.all()
    for index in (image_of_text, text_of_image):
      assert (inputs["image_id"][np.asarray(index)] != inputs["image_id"]).all()


@pytest.mark.parametrize("name", ["itm_hard", "itm_random"])
def test_matching_works_for_a_batch_of_one(name):
  module = alone(name)
  inputs = tiny.batch(1)
  variables = tiny.init(module, inputs)
  total, (metrics, _) = tiny.loss(module, variables, inputs)
  assert np.isfinite(total) and metrics["it"].weight == 1


def test_mlm_head_only_sees_masked_positions_and_gets_the_same_loss():
  inputs = tiny.batch(8)
  full = pretrainer_lib.Pretrainer(
    tiny.model(),
    {"it": mlm.Objective(vocab=tiny.VOCAB, width=WIDTH, rate=0.2, max_masked=10)},
    {"it": 1.0},
  )
  few = pretrainer_lib.Pretrainer(
    tiny.model(),
    {"it": mlm.Objective(vocab=tiny.VOCAB, width=WIDTH, rate=0.2, max_masked=9)},
    {"it": 1.0},
  )
  variables = tiny.init(full, inputs)
  want, (metrics, _) = tiny.loss(full, variables, inputs)
  got, _ = tiny.loss(few, variables, inputs)
  assert 0 < metrics["it"].weight < inputs["text_mask"].sum()
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_teacher_is_asked_for_in_words():
  module = alone("itc_queue")
  variables = tiny.init(alone("itc_queue"), tiny.batch(8))
  with pytest.raises(ValueError, match="set ema_decay"):
    tiny.loss(module, variables, tiny.batch(8))


def test_a_queue_smaller_than_the_batch_is_refused():
  with pytest.raises(ValueError, match="smaller than batch_size=32"):
    tiny.init(alone("itc_queue"), tiny.batch(32))


def test_words_are_masked_by_a_piece_that_there_is():
  vocab = dataclasses.replace(tiny.VOCAB, mask=None)
  module = alone("mlm")
  module = module.clone(objectives=dict(mlm=mlm.Objective(vocab=vocab, width=16)))
  with pytest.raises(ValueError, match="no piece that masks"):
    tiny.init(module, tiny.batch(4))


def test_weights_add_the_losses_up():
  inputs = tiny.batch(8)
  module = tiny.albef()
  variables = tiny.init(module, inputs)
  teacher = variables["params"]
  total, (metrics, _) = tiny.loss(module, variables, inputs, teacher=teacher)
  want = sum(metrics[name].value() for name in ("itc", "itm", "mlm"))
  np.testing.assert_allclose(total, want, rtol=1e-6)
  heavy = module.clone(weights=dict(itc=0.0, itm=2.0, mlm=0.5))
  total, _ = tiny.loss(heavy, variables, inputs, teacher=teacher)
  want = 2 * metrics["itm"].value() + 0.5 * metrics["mlm"].value()
  np.testing.assert_allclose(total, want, rtol=1e-6)


def test_dropping_an_objective_drops_its_parameters():
  inputs = tiny.batch(8)
  paths = tree.flatten(tiny.init(alone("itc"), inputs)["params"])
  assert not [path for path in paths if path.startswith("objectives")]


def test_sigmoid_refuses_what_it_cannot_use():
  module = pretrainer_lib.Pretrainer(
    tiny.model(), {"it": itc.Objective(loss="sigmoid", queue=16)}, {"it": 1.0}
  )
  with pytest.raises(ValueError, match="no queue"):
    tiny.init(module, tiny.batch(8))
