"""Image-text contrast (ITC) on plain arrays.

Shape letters: B batch, E embedding, Q queue, C candidates (B + Q).
"""

import jax
import jax.numpy as jnp


def normalize(x: jax.Array, *, eps: float = 1e-12) -> jax.Array:
  """Unit Euclidean norm along the last axis, in float32 (torch's F.normalize)."""
  x = x.astype(jnp.float32)
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  # The root of zero has no gradient: the floor is taken before the root.
  return x * jax.lax.rsqrt(jnp.maximum(square, eps * eps))


def positives(ids_B: jax.Array, ids_C: jax.Array) -> jax.Array:
  """Target distribution over candidates: uniform over those of the same image.

  Args:
    ids_B: int32 [B] image ids of the rows.
    ids_C: int32 [C] image ids of the candidates; the first B are the rows' own.
      Negative ids mark empty queue slots, which match nothing.

  Returns:
    float32 [B, C], each row sums to one. ALBEF's model_retrieval.py.
  """
  same = (ids_B[:, None] == ids_C[None, :]) & (ids_C >= 0)[None, :]
  same = same.astype(jnp.float32)
  return same / same.sum(axis=1, keepdims=True)


def soften(targets_BC: jax.Array, teacher_BC: jax.Array, alpha: jax.Array) -> jax.Array:
  """ALBEF eq. 6: alpha of the teacher's softmax, 1 - alpha of the hard targets."""
  return alpha * jax.nn.softmax(teacher_BC, axis=1) + (1.0 - alpha) * targets_BC


def cross_entropy(logits_BC: jax.Array, targets_BC: jax.Array) -> jax.Array:
  """-sum_c targets log softmax(logits) -> float32 [B]."""
  logp_BC = jax.nn.log_softmax(logits_BC.astype(jnp.float32), axis=1)
  return -jnp.sum(logp_BC * targets_BC, axis=1)


def sigmoid(logits_BB: jax.Array, positives_BB: jax.Array) -> jax.Array:
  """SigLIP eq. 1: sum over candidates of -log sigmoid(+-logits) -> float32 [B].

  Args:
    logits_BB: [B, B] scaled similarities, bias added.
    positives_BB: bool [B, B], true where image and text belong together.
  """
  sign = jnp.where(positives_BB, 1.0, -1.0)
  return -jnp.sum(jax.nn.log_sigmoid(sign * logits_BB.astype(jnp.float32)), axis=1)


def enqueue(queue_QE: jax.Array, rows_BE: jax.Array, start: jax.Array) -> jax.Array:
  """Writes rows at `start`, `start + 1`, … (around the end) of a ring of Q rows.

  Args:
    queue_QE: [Q, …] the ring.
    rows_BE: [B, …] new rows, B <= Q.
    start: int32 [] where the first goes.
  """
  at = (start + jnp.arange(rows_BE.shape[0])) % queue_QE.shape[0]
  return queue_QE.at[at].set(rows_BE.astype(queue_QE.dtype))
