"""Attention masks, MLM corruption and negatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.ops import mask as mask_lib

MASK = 3


def corrupt(ids, maskable, seed=0, **kwargs):
  kwargs = dict(rate=0.3, mask_id=MASK, vocab_size=50) | kwargs
  out = mask_lib.mlm_corrupt(
    jax.random.key(seed), jnp.asarray(ids), jnp.asarray(maskable), **kwargs
  )
  return [np.asarray(x) for x in out]


def test_attention_kinds():
  real = jnp.array([[True, True, True, False]])
  assert mask_lib.attention(None, "bidirectional") is None
  both = mask_lib.attention(real, "bidirectional")
  np.testing.assert_array_equal(both[0, 0], [[1, 1, 1, 0]])
  causal = mask_lib.attention(real, "causal")[0, 0]
  want = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
  np.testing.assert_array_equal(causal, want)
  prefix = mask_lib.attention(real, "prefix", prefix_B=jnp.array([2]))[0, 0]
  want = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
  np.testing.assert_array_equal(prefix, want)


def test_attention_says_what_is_missing():
  with pytest.raises(ValueError, match="text mask"):
    mask_lib.attention(None, "causal")
  with pytest.raises(ValueError, match="prefix_B"):
    mask_lib.attention(jnp.ones((1, 2), bool), "prefix")
  with pytest.raises(ValueError, match="bidirectional, causal or prefix"):
    mask_lib.attention(jnp.ones((1, 2), bool), "sideways")


def test_corruption_has_berts_shares():
  ids = np.full((400, 50), 20, np.int32)
  maskable = np.ones_like(ids, bool)
  maskable[:, 0] = False
  out, predicted = corrupt(ids, maskable)
  count = predicted.sum()
  assert not predicted[:, 0].any()
  np.testing.assert_allclose(count / maskable.sum(), 0.3, atol=0.015)
  np.testing.assert_array_equal(out[~predicted], ids[~predicted])
  changed = out[predicted]
  np.testing.assert_allclose((changed == MASK).mean(), 0.8 + 0.1 / 50, atol=0.015)
  np.testing.assert_allclose((changed == 20).mean(), 0.1 + 0.1 / 50, atol=0.015)


def test_corruption_is_a_function_of_the_key_alone():
  ids = np.arange(60, dtype=np.int32).reshape(6, 10) % 40 + 5
  one = corrupt(ids, np.ones_like(ids, bool), seed=1)
  again = corrupt(ids, np.ones_like(ids, bool), seed=1)
  other = corrupt(ids, np.ones_like(ids, bool), seed=2)
  np.testing.assert_array_equal(one[0], again[0])
  assert (one[1] != other[1]).any()


def test_whole_words_are_masked_together():
  ids = np.tile(np.arange(10, 22, dtype=np.int32), (200, 1))
  continuation = np.zeros_like(ids, bool)
  continuation[:, [2, 3, 7]] = True  # words: 0 | 1 2 3 | 4 | 5 | 6 7 | 8 …
  _, predicted = corrupt(ids, np.ones_like(ids, bool), continuation_BL=continuation)
  for word in ([1, 2, 3], [6, 7]):
    together = predicted[:, word]
    assert (together.all(axis=1) == together.any(axis=1)).all()
  np.testing.assert_allclose(predicted[:, 1].mean(), 0.3, atol=0.1)


def test_max_masked_leaves_the_rest_alone():
  ids = np.tile(np.arange(10, 40, dtype=np.int32), (100, 1))
  out, predicted = corrupt(ids, np.ones_like(ids, bool), rate=0.5, max_masked=4)
  assert predicted.sum(axis=1).max() == 4
  np.testing.assert_array_equal(out[~predicted], ids[~predicted])


def test_negatives_exclude_images_and_stay_in_their_group():
  ids = jnp.array([1, 2, 1, 3])
  by_image = mask_lib.negatives_allowed(ids, matches="image")
  want = [[0, 1, 0, 1], [1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 0]]
  np.testing.assert_array_equal(by_image, want)
  by_pair = mask_lib.negatives_allowed(ids, matches="pair")
  np.testing.assert_array_equal(by_pair, ~np.eye(4, dtype=bool))
  grouped = mask_lib.negatives_allowed(ids, matches="pair", group=2)
  want = [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
  np.testing.assert_array_equal(grouped, want)


def test_hard_negatives_follow_the_softmax():
  logits = jnp.array([[9.0, 0.0, 1.0, 2.0]])
  allowed = jnp.array([[False, True, True, True]])
  draw = lambda key: mask_lib.draw_negatives(key, logits, allowed)[0][0]
  got = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), 4000)))
  assert (got != 0).all()
  want = np.exp([0.0, 1.0, 2.0])
  shares = np.bincount(got, minlength=4)[1:] / 4000
  np.testing.assert_allclose(shares, want / want.sum(), atol=0.03)


def test_a_batch_of_one_has_no_negative_and_no_nan():
  index, found = mask_lib.draw_negatives(
    jax.random.key(0), jnp.zeros((1, 1)), jnp.zeros((1, 1), bool)
  )
  assert index.tolist() == [0] and found.tolist() == [False]
