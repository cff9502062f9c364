"""Cross-attention maps: the arithmetic, and that a tiny ALBEF gives them up."""

import jax
import numpy as np
import pytest

from tests import tiny
from vlp_jax.explain import attention


def test_word_maps_drop_the_class_token_and_average_heads():
  rng = np.random.default_rng(0)
  weights = rng.random((3, 2, 4, 5, 7), np.float32)  # one class token, 2 x 3 patches
  maps = attention.word_maps(weights, (2, 3), layer=2)
  assert maps.shape == (2, 5, 2, 3)
  want = np.mean([weights[2, 1, n, 4, 1 + 3 * 1 + 2] for n in range(4)])
  np.testing.assert_allclose(maps[1, 4, 1, 2], want, rtol=1e-6)
  np.testing.assert_array_equal(
    attention.word_maps(weights, (2, 3)), attention.word_maps(weights, (2, 3), layer=1)
  )


def test_gradcam_counts_positive_gradients_only():
  rng = np.random.default_rng(1)
  weights = rng.random((1, 1, 2, 3, 4), np.float32)
  gradient = rng.standard_normal((1, 1, 2, 3, 4)).astype(np.float32)
  maps = attention.word_maps(weights, (2, 2), gradient=gradient)
  want = (weights * np.maximum(gradient, 0)).mean(2).reshape(1, 3, 2, 2)
  np.testing.assert_allclose(maps, want, rtol=1e-6)


def test_albef_reads_the_third_of_six():
  assert attention.default_layer(6) == 2 and attention.default_layer(1) == 0


@pytest.mark.parametrize("grid, layer", [((3, 3), 0), ((2, 2), 1), ((2, 2), -1)])
def test_wrong_grid_or_layer(grid, layer):
  with pytest.raises(ValueError, match=r"3 x 3 patches|layers 0 … 0"):
    attention.word_maps(np.zeros((1, 1, 1, 2, 5)), grid, layer=layer)


def test_upsample_keeps_the_place_and_a_flat_map_is_cold():
  maps = np.zeros((2, 4, 4))
  maps[0, 3, 0] = 5.0
  big = attention.upsample(maps, 32)
  assert big.shape == (2, 32, 32) and big.min() == 0.0 and big.max() == 1.0
  row, column = np.unravel_index(big[0].argmax(), (32, 32))
  assert row >= 24 and column < 8
  np.testing.assert_array_equal(big[1], 0.0)


def test_overlay_shows_the_image_where_it_is_cold():
  image = np.full((4, 4, 3), 100, np.uint8)
  heat = np.zeros((4, 4))
  heat[0, 0] = 1.0
  got = attention.overlay(image, heat, np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
  np.testing.assert_array_equal(got[0, 0], [255, 0, 0])
  np.testing.assert_array_equal(got[3, 3], [100, 100, 100])


@pytest.fixture(scope="module")
def albef():
  module = tiny.albef(queue=0, distill=0.0)
  inputs = tiny.batch(3)
  return module, tiny.init(module, inputs)["params"], inputs


def test_weights_of_the_fusion_stack(albef):
  module, params, inputs = albef
  args = (inputs["image"], inputs["text"], inputs["text_mask"])
  weights, none = attention.cross_attention(module, params, *args, kind="attention")
  assert none is None and weights.shape == (2, 3, 2, 10, 5)
  np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)

  seen, gradient = attention.cross_attention(module, params, *args)
  np.testing.assert_allclose(seen, weights, atol=1e-6)
  assert gradient.shape == weights.shape and np.abs(gradient).max() > 0

  # Against a difference quotient: one weight of one word of the second pair.
  at = (1, 1, 0, 0, 2)

  def score(amount):
    def call(m, image, ids, mask):
      tokens = m.model.encode_image(image), m.model.encode_text(ids, mask)
      return m.objectives["itm"].score(m.model, *tokens)

    probe = np.zeros(weights.shape, np.float32)
    probe[at] = amount
    names = ("model", "fusion", "blocks", "cross", "weights")
    tree = probe
    for name in reversed(names):
      tree = {name: tree}
    variables = {"params": params, "perturbations": tree}
    return module.apply(variables, *args, method=call).sum()

  quotient = (score(1.0) - score(-1.0)) / 2.0
  # The last layers are not linear in it: a wide step keeps float32 noise below 1 %.
  np.testing.assert_allclose(gradient[at], quotient, rtol=0.05, atol=1e-5)


def test_a_dual_encoder_has_no_maps(albef):
  module, params, inputs = albef
  bare = module.clone(model=module.model.clone(fusion=None))
  args = (inputs["image"], inputs["text"], inputs["text_mask"])
  with pytest.raises(ValueError, match="model.fusion is not set"):
    attention.cross_attention(bare, params, *args)


def test_find_wants_one_stack():
  with pytest.raises(ValueError, match="has 0"):
    attention.find({"blocks": {"attn": {"weights": (np.zeros(1),)}}})
  assert jax.tree.leaves(attention.find({"cross": {"weights": (1,)}})[1]) == [1]
