"""Optimal transport: the official loop in slow numpy, and what a plan promises."""

import jax
import jax.numpy as jnp
import numpy as np

from vlp_jax.ops import transport


def cases():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(3, 5, 8)), rng.normal(size=(3, 7, 8))
  x_mask, y_mask = np.ones((3, 5), bool), np.ones((3, 7), bool)
  x_mask[1, 3:], y_mask[1, :2], y_mask[2, 6:] = False, False, False
  return x.astype(np.float32), y.astype(np.float32), x_mask, y_mask


def slow(x, y, beta=0.5, iterations=50):
  """Algorithm 1 of the paper, for one pair without padding, in float64."""
  x, y = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, y))
  cost = 1 - x @ y.T
  words, patches = cost.shape
  kernel, plan = np.exp(-cost / beta), np.ones_like(cost)
  sigma = np.full(words, 1 / words)
  for _ in range(iterations):
    q = kernel * plan
    delta = 1 / (patches * (q.T @ sigma))
    sigma = 1 / (words * (q @ delta))
    plan = sigma[:, None] * q * delta[None, :]
  return plan, cost


def test_it_is_the_slow_loop_on_what_is_real():
  x, y, x_mask, y_mask = cases()
  plan, cost = transport.plan(x, y, x_mask, y_mask)
  for i in range(3):
    rows, columns = np.nonzero(x_mask[i])[0], np.nonzero(y_mask[i])[0]
    want = slow(x[i, rows].astype(np.float64), y[i, columns].astype(np.float64))
    for got, oracle in zip((plan[i], cost[i]), want, strict=True):
      got = np.asarray(got)
      np.testing.assert_allclose(got[np.ix_(rows, columns)], oracle, atol=1e-5)
      rest = np.ones_like(got, bool)
      rest[np.ix_(rows, columns)] = False
      assert (got[rest] == 0).all()


def test_a_plan_moves_everything():
  x, y, x_mask, y_mask = cases()
  plan, _ = transport.plan(x, y, x_mask, y_mask)
  # The last update was of the words' side: it is exact there.
  want = x_mask / x_mask.sum(1, keepdims=True)
  np.testing.assert_allclose(plan.sum(2), want, atol=1e-5)
  np.testing.assert_allclose(plan.sum((1, 2)), 1, rtol=1e-5)


def test_gradients_go_through_the_cost_alone_and_are_finite():
  x, y, x_mask, y_mask = cases()
  x[0, 0] = 0.0  # a token of nothing has no direction

  def distance(x):
    plan, cost = transport.plan(x, y, x_mask, y_mask)
    return jnp.sum(plan * cost)

  def by_cost(x):
    _, cost = transport.plan(x, y, x_mask, y_mask)
    return jnp.sum(fixed * cost)

  fixed, _ = transport.plan(x, y, x_mask, y_mask)
  got, want = jax.grad(distance)(x), jax.grad(by_cost)(x)
  assert np.isfinite(got).all() and np.abs(got).max() > 0
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
  assert (np.asarray(got)[1, 3:] == 0).all()
