"""Masked region modelling: one modality masked at a time; the contract of a loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import test_uniter
from tests import tiny
from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.objectives import mrm
from vlp_jax.ops import mask as mask_lib


def batch():
  keys = ("image", "text", "text_mask", "image_id")
  return {key: test_uniter.batch()[key] for key in keys}


@functools.cache
def module(target="features"):
  whole = test_uniter.pretrainer()
  objective = mrm.Objective(width=test_uniter.WIDTH, target=target, init_std=0.3)
  return whole.clone(objectives=dict(mrm=objective), weights=dict(mrm=1.0))


@functools.cache
def variables(target="features"):
  return tiny.init(module(target), batch())


def test_some_real_regions_are_hidden_and_of_each_image_one():
  real = jnp.arange(20) < jnp.array([20, 7, 1, 0])[:, None]
  draw = jax.jit(lambda key: mask_lib.hide_some(key, real, 0.15))
  drawn = np.stack([draw(jax.random.key(i)) for i in range(200)])
  assert not drawn[:, ~np.asarray(real)].any()
  np.testing.assert_array_equal(drawn.any(axis=2).all(axis=0), [True] * 3 + [False])
  # 0.15 of many; of seven a little more, as none hides one.
  assert abs(drawn[:, 0].mean() - 0.15) < 0.02
  few = drawn[:, 1, :7].mean()
  assert abs(few - (0.15 + 0.85**7 / 7)) < 0.03
  # Which one is, where chance hides none, is any.
  alone = np.stack(
    [mask_lib.hide_some(jax.random.key(i), real[:1], 0.0) for i in range(100)]
  )
  assert (alone.sum(axis=2) == 1).all() and len(set(alone.argmax(axis=2).ravel())) > 10


def test_the_text_is_whole_where_regions_are_hidden(monkeypatch):
  """Conditional masking: with hidden regions the words are fused as they are."""
  seen = {}
  model = type(module().model)
  encode = model.encode_image

  class Enough(Exception):
    pass

  def watched_fuse(self, image, text, **more):
    seen["text"] = text.x
    raise Enough

  def watched_encode(self, image, size=None, hidden=None, **more):
    seen.setdefault("hidden", []).append(hidden)
    return encode(self, image, size, hidden, **more)

  given = variables()
  monkeypatch.setattr(model, "fuse", watched_fuse)
  monkeypatch.setattr(model, "encode_image", watched_encode)
  inputs = {key: jnp.asarray(x) for key, x in batch().items()}
  with pytest.raises(Enough):
    module().apply(given, inputs, rngs=tiny.rngs())
  encoded = module().bind(given).model.text(inputs["text"], inputs["text_mask"])
  np.testing.assert_array_equal(seen["text"], encoded.x)
  whole, hidden = seen["hidden"]
  assert whole is None and hidden.any(axis=1).all()


def test_the_contract():
  made, given = module("class"), variables("class")
  loss, (metrics, _) = tiny.loss(made, given, batch())
  again, _ = tiny.loss(made, given, batch())
  other, _ = tiny.loss(made, given, batch(), seed=1)
  assert float(loss) == float(again) != float(other)
  assert set(metrics) == {"mrm", "mrm/accuracy"}
  noise = np.where(batch()["text_mask"], batch()["text"], 9).astype(np.int32)
  padded, _ = tiny.loss(made, given, batch() | dict(text=noise))
  np.testing.assert_allclose(padded, loss, rtol=1e-5)
  half = made.clone(model=_in_bf16(made.model))
  low, _ = tiny.loss(half, given, batch())
  assert low.dtype == jnp.float32
  np.testing.assert_allclose(low, loss, rtol=0.05)


def _in_bf16(model):
  parts = (model.image, model.text, model.fusion)
  image, text, fusion = (part.clone(dtype="bfloat16") for part in parts)
  return model.clone(image=image, text=text, fusion=fusion)


def test_it_looks_across_no_rows():
  """Another order of the rows is the same loss, of what is hidden with them."""
  order = np.random.default_rng(0).permutation(test_uniter.BATCH)
  hidden = test_uniter.batch()["hidden"]

  def loss(inputs, hidden):
    def run(self, inputs, hidden):
      live = pretrainer_lib.ask_lib.Live()
      enc = pretrainer_lib.encode(self.model, live, inputs, jnp.int32(0))
      objective = self.objectives["mrm"]
      return objective.loss(self.model, enc, inputs, hidden, train=False)[0].value()

    return module().apply(variables(), inputs, hidden, method=run)

  run = jax.jit(loss)
  want = run(batch(), hidden)
  moved = jax.tree.map(lambda x: x[order], (batch(), hidden))
  np.testing.assert_allclose(run(*moved), want, rtol=1e-5)
