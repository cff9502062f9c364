"""Contrastive losses against slow numpy, and the ring of earlier embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.ops import contrastive


def unit(rng, *shape):
  x = rng.normal(size=shape)
  return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def slow_softmax_loss(logits, targets):
  losses = []
  for row, target in zip(logits, targets, strict=True):
    p = np.exp(row - row.max())
    p = p / p.sum()
    losses.append(-sum(t * np.log(q) for t, q in zip(target, p, strict=True)))
  return np.array(losses)


def test_cross_entropy_and_its_gradient_match_numpy():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(4, 7)).astype(np.float64)
  targets = rng.dirichlet(np.ones(7), size=4)
  got = contrastive.cross_entropy(jnp.float32(logits), jnp.float32(targets))
  np.testing.assert_allclose(got, slow_softmax_loss(logits, targets), rtol=1e-5)
  grad = jax.grad(lambda x: contrastive.cross_entropy(x, jnp.float32(targets)).sum())(
    jnp.float32(logits)
  )
  numeric = np.zeros_like(logits)
  for at in np.ndindex(*logits.shape):
    step = np.zeros_like(logits)
    step[at] = 1e-5
    up = slow_softmax_loss(logits + step, targets).sum()
    numeric[at] = (up - slow_softmax_loss(logits - step, targets).sum()) / 2e-5
  np.testing.assert_allclose(grad, numeric, atol=1e-5)


def test_sigmoid_matches_numpy():
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(3, 3)) * 5
  positive = np.eye(3, dtype=bool)
  want = [
    -sum(
      np.log(1 / (1 + np.exp(-logits[i, j] if positive[i, j] else logits[i, j])))
      for j in range(3)
    )
    for i in range(3)
  ]
  got = contrastive.sigmoid(jnp.float32(logits), positive)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_targets_know_images():
  ids = jnp.array([7, 8, 7])
  queue = jnp.array([8, -1, -1])
  got = contrastive.positives(ids, jnp.concatenate([ids, queue]))
  want = [
    [0.5, 0, 0.5, 0, 0, 0],
    [0, 0.5, 0, 0.5, 0, 0],
    [0.5, 0, 0.5, 0, 0, 0],
  ]
  np.testing.assert_allclose(got, want)


def test_soft_targets_are_distributions_between_hard_and_teacher():
  rng = np.random.default_rng(2)
  teacher = jnp.float32(rng.normal(size=(3, 5)))
  hard = jnp.eye(3, 5)
  got = contrastive.soften(hard, teacher, jnp.float32(0.4))
  np.testing.assert_allclose(got.sum(axis=1), 1, rtol=1e-6)
  np.testing.assert_allclose(contrastive.soften(hard, teacher, jnp.float32(0)), hard)


@pytest.mark.parametrize("start", [0, 3, 6])
def test_enqueue_goes_around_the_end(start):
  queue = jnp.zeros((8, 2))
  rows = jnp.arange(6, dtype=jnp.float32).reshape(3, 2) + 1
  want = np.zeros((8, 2), np.float32)
  for i, row in enumerate(np.asarray(rows)):
    want[(start + i) % 8] = row
  np.testing.assert_array_equal(contrastive.enqueue(queue, rows, start), want)


def test_normalize_has_a_gradient_at_zero():
  x = jnp.zeros((1, 4))
  grad = jax.grad(lambda x: contrastive.normalize(x).sum())(x)
  assert np.isfinite(grad).all()
  rng = np.random.default_rng(3)
  y = rng.normal(size=(5, 4)).astype(np.float32)
  want = y / np.linalg.norm(y, axis=1, keepdims=True)
  np.testing.assert_allclose(contrastive.normalize(y), want, rtol=1e-6)
