"""Optimal transport by IPOT, the inexact proximal point method.

Xie et al. 2018, https://arxiv.org/abs/1802.04307, algorithm 1, as UNITER and ViLT run
it (vilt/modules/objectives.py ipot, optimal_transport_dist): uniform weights on what
is real, cosine cost, no gradient through the plan.

Shape letters: B batch, M words, N patches, D width.
"""

import jax
import jax.numpy as jnp

# What is padded gets 1 / (0 + HIDDEN) for its weight; the official constant.
HIDDEN = 1e4
EPS = 1e-5  # of the norms in the cosine


def plan(
  x_BMD: jax.Array,
  y_BND: jax.Array,
  x_mask_BM: jax.Array,
  y_mask_BN: jax.Array,
  *,
  beta: float = 0.5,
  iterations: int = 50,
) -> tuple[jax.Array, jax.Array]:
  """(plan [B, M, N], cost [B, M, N]), float32; zero where either side is padding.

  The distance is sum(plan * cost); gradients go through the cost alone.

  Args:
    x_BMD, y_BND: what is moved, and where to. x_mask_BM, y_mask_BN: bool, what is real.
    beta: of the proximal term; smaller is nearer to the exact plan, and less stable.
    iterations: of the outer loop; the inner one has one (k = 1).
  """
  real_BMN = x_mask_BM[:, :, None] & y_mask_BN[:, None, :]
  cost_BMN = 1.0 - jnp.einsum("BMD,BND->BMN", _unit(x_BMD), _unit(y_BND))
  cost_BMN = jnp.where(real_BMN, cost_BMN, 0.0)
  fixed_BMN = jax.lax.stop_gradient(cost_BMN)
  kernel_BMN = jnp.where(real_BMN, jnp.exp(-fixed_BMN / beta), 0.0)
  x_len_B1 = x_mask_BM.sum(axis=1, keepdims=True).astype(jnp.float32)
  y_len_B1 = y_mask_BN.sum(axis=1, keepdims=True).astype(jnp.float32)
  x_hidden_BM = jnp.where(x_mask_BM, 0.0, HIDDEN)
  y_hidden_BN = jnp.where(y_mask_BN, 0.0, HIDDEN)

  def step(carry, _):
    plan_BMN, sigma_BM = carry
    q_BMN = kernel_BMN * plan_BMN
    delta_BN = 1 / (y_len_B1 * jnp.einsum("BMN,BM->BN", q_BMN, sigma_BM) + y_hidden_BN)
    sigma_BM = 1 / (x_len_B1 * jnp.einsum("BMN,BN->BM", q_BMN, delta_BN) + x_hidden_BM)
    plan_BMN = sigma_BM[:, :, None] * q_BMN * delta_BN[:, None, :]
    return (plan_BMN, sigma_BM), None

  start = (
    real_BMN.astype(jnp.float32),
    jnp.where(x_mask_BM, 1 / jnp.maximum(x_len_B1, 1.0), 0.0),
  )
  (plan_BMN, _), _ = jax.lax.scan(step, start, length=iterations)
  return jnp.where(real_BMN, plan_BMN, 0.0), cost_BMN


def _unit(x):
  x = x.astype(jnp.float32)
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  # The norm from below, as torch's normalize: no division by nothing.
  return x / jnp.sqrt(jnp.maximum(square, EPS**2))
