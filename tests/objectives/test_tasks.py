"""Downstream heads: what they promise beside their parity with the official code."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.models import text
from vlp_jax.models.fusion import paired
from vlp_jax.nn import attention
from vlp_jax.objectives import classify
from vlp_jax.objectives import itc
from vlp_jax.objectives import vqa

WIDTH = 16
SIZES = dict(num_heads=2, mlp_dim=32, init_std=None)


def two_images(**fields):
  objective = classify.Objective(width=WIDTH, classes=3, images=2, **fields)
  model = tiny.model(depth=1).clone(
    fusion=paired.Fusion(depth=2, **SIZES), embed_dim=None
  )
  return pretrainer_lib.Pretrainer(model, {"it": objective}, {"it": 1.0})


def answers(**fields):
  objective = vqa.Objective(
    vocab=tiny.VOCAB, width=WIDTH, answers=2, length=5, **fields
  )
  decoder = text.Encoder(vocab=tiny.VOCAB, width=WIDTH, depth=1, length=5, **SIZES)
  model = tiny.model(depth=1).clone(decoder=decoder, embed_dim=None)
  return pretrainer_lib.Pretrainer(model, {"it": objective}, {"it": 1.0})


def batch_of(module, size=4):
  """A batch with the columns that the objective asks for."""
  rng = np.random.default_rng(1)
  batch = tiny.batch(size)
  if isinstance(module.objectives["it"], classify.Objective):
    image2 = rng.integers(0, 256, batch["image"].shape).astype(np.uint8)
    return batch | dict(image2=image2, label=np.arange(size, dtype=np.int32) % 3)
  mask = np.arange(5) < rng.integers(2, 6, (size, 2))[..., None]
  ids = np.where(mask, rng.integers(5, tiny.VOCAB.size, (size, 2, 5)), 0)
  weight = np.array([[0.7, 0.3], [1.0, 0.0], [0.5, 0.5], [1.0, 0.0]], np.float32)
  ids[..., 0] = tiny.VOCAB.cls
  return batch | dict(
    answer=ids.astype(np.int32), answer_mask=mask, answer_weight=weight
  )


@pytest.fixture(scope="module", params=[two_images, answers], ids=["classify", "vqa"])
def case(request):
  module = request.param()
  inputs = batch_of(module)
  return module, tiny.init(module, inputs), inputs


def test_losses_are_finite_and_near_a_guess(case):
  module, variables, inputs = case
  total, (metrics, _) = tiny.loss(module, variables, inputs)
  guess = np.log(3)
  if "answer" in inputs:
    words = inputs["answer_mask"][..., 1:].sum(axis=-1)
    guess = np.log(tiny.VOCAB.size) * np.mean((words * inputs["answer_weight"]).sum(1))
  assert total.dtype == jnp.float32 and 0.3 * guess < total < 4 * guess
  assert all(np.isfinite(mean.value()) for mean in metrics.values())


def test_padding_changes_nothing(case):
  module, variables, inputs = case
  noise = np.where(inputs["text_mask"], inputs["text"], 9).astype(np.int32)
  other = inputs | {"text": noise}
  if "answer" in inputs:
    hidden = ~inputs["answer_mask"] | (inputs["answer_weight"] == 0)[..., None]
    other["answer"] = np.where(hidden, 7, inputs["answer"]).astype(np.int32)
  want, _ = tiny.loss(module, variables, inputs)
  got, _ = tiny.loss(module, variables, other)
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_the_order_of_examples_does_not_matter(case):
  module, variables, inputs = case
  order = np.array([2, 0, 3, 1])
  want, _ = tiny.loss(module, variables, inputs)
  got, _ = tiny.loss(module, variables, {k: v[order] for k, v in inputs.items()})
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_second_image_matters(case):
  module, variables, inputs = case
  if "image2" not in inputs:
    pytest.skip("of one image")
  want, _ = tiny.loss(module, variables, inputs)
  got, _ = tiny.loss(module, variables, inputs | {"image2": inputs["image"]})
  assert got != want


def test_keys_and_values_made_elsewhere_are_those_of_the_layer():
  rng = np.random.default_rng(0)
  x, memory = (jnp.asarray(rng.normal(size=(2, n, 8)), jnp.float32) for n in (3, 5))
  module = attention.Attention(num_heads=2)
  params = nn.unbox(module.init(jax.random.key(0), x, memory))["params"]
  want = module.apply({"params": params}, x, memory)
  made = [
    jnp.einsum("BSD,DNH->BSNH", memory, params[name]["kernel"]) + params[name]["bias"]
    for name in ("key", "value")
  ]
  shared = attention.KeyValue(*made)
  own = {name: params[name] for name in ("query", "out")}
  got = module.apply({"params": own}, x, shared)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  assert set(module.init(jax.random.key(0), x, shared)["params"]) == set(own)


# --- What is told ---------------------------------------------------------------------


@pytest.mark.parametrize("make", [two_images, answers])
def test_distilling_wants_a_teacher(make):
  module = make(distill=0.4)
  inputs = batch_of(module)
  run = lambda: module.init(jax.random.key(0), inputs, train=True)
  with pytest.raises(ValueError, match=r"distill wants a teacher: set ema_decay"):
    jax.eval_shape(run)


def test_what_a_model_lacks_is_told():
  inputs = batch_of(answers())
  lacks = answers().clone(model=tiny.model(depth=1))
  with pytest.raises(ValueError, match=r"model.decoder is not set: say e\.g\."):
    jax.eval_shape(lambda: lacks.init(jax.random.key(0), inputs))
  contrast = answers().clone(objectives={"it": itc.Objective()})
  with pytest.raises(ValueError, match="but model.embed_dim=None"):
    jax.eval_shape(lambda: contrast.init(jax.random.key(0), inputs))
  one = two_images().clone(
    objectives={"it": classify.Objective(width=WIDTH, classes=3)}
  )
  with pytest.raises(ValueError, match='type="paired" fuses two images'):
    jax.eval_shape(lambda: one.init(jax.random.key(0), batch_of(one)))
  three = two_images().clone(
    objectives={"it": classify.Objective(width=WIDTH, classes=3, images=3)}
  )
  with pytest.raises(ValueError, match="images=3: want 1 or 2"):
    jax.eval_shape(lambda: three.init(jax.random.key(0), batch_of(three)))
