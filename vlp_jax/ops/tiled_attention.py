"""softmax(Q K^T / sqrt(d)) V of some heads at a time, for a processor's cache.

The weights [L, S] of a few heads are made, used and forgotten before the next ones',
and the backward pass makes them again (as FlashAttention does with tiles of one head:
Dao et al. 2022, https://arxiv.org/abs/2205.14135). Of 577 patches all weights of a
batch are hundreds of megabytes, which a CPU waits for.

Shape letters: B batch, L query length, S key length, N heads, H head_dim, T heads of a
tile.
"""

import jax
import jax.numpy as jnp

TILE = 4 << 20  # bytes of weights that are worked on at once
# Bytes of an example's weights from which on tiles are the faster way: below, the
# copies that put the heads of an example side by side cost more than they spare.
WORTH = 1 << 20


def worth(query: jax.Array, key: jax.Array) -> bool:
  """Whether `attend` is faster than plain products here: float32, long sequences."""
  _, length, heads, _ = query.shape
  return query.dtype == jnp.float32 and 4 * heads * length * key.shape[1] >= WORTH


def attend(
  query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> jax.Array:
  """[B, L, N, H] of query [B, L, N, H], key and value [B, S, N, H].

  mask bool [1|B, 1, 1|L, S] says which keys are seen. A query that sees none gets the
  mean of all values.
  """
  batch, length, heads, head_dim = query.shape
  tile = _heads_of_a_tile(heads, length, key.shape[1])

  def tiles(x):
    x = x.transpose(0, 2, 1, 3)
    return x.reshape(batch * heads // tile, tile, x.shape[2], head_dim)

  if mask is not None:
    mask = jnp.broadcast_to(mask, (batch, *mask.shape[1:]))
    mask = jnp.repeat(mask, heads // tile, axis=0)
  mixed = _mix(tiles(query * head_dim**-0.5), tiles(key), tiles(value), mask)
  mixed = mixed.reshape(batch, heads, length, head_dim)
  return mixed.transpose(0, 2, 1, 3)


def _heads_of_a_tile(heads, length, keys):
  """As many as fit into `TILE` and share an example's heads evenly; one at least."""
  fit = max(TILE // (4 * length * keys), 1)
  return max(n for n in range(1, heads + 1) if heads % n == 0 and n <= fit)


@jax.custom_vjp
def _mix(query, key, value, mask):
  """query [tiles, T, L, H], key and value [tiles, T, S, H], mask [tiles, 1, 1|L, S]."""
  return _forward(query, key, value, mask)[0]


def _forward(query, key, value, mask):
  def one(tile):
    query, key, value, mask = tile
    logits = _logits(query, key, mask)
    top = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    return jnp.einsum("tls,tsh->tlh", weights, value) / total, top, total

  mixed, top, total = jax.lax.map(one, (query, key, value, mask))
  return mixed, (query, key, value, mask, mixed, top, total)


def _backward(kept, given):
  def one(tile):
    (query, key, value, mask, mixed, top, total), given = tile
    weights = jnp.exp(_logits(query, key, mask) - top) / total
    to_value = jnp.einsum("tls,tlh->tsh", weights, given)
    # The gradient of a softmax: w (g - sum w g), and the sum is that of mixed * given.
    common = (mixed * given).sum(axis=-1, keepdims=True)
    logits = weights * (jnp.einsum("tlh,tsh->tls", given, value) - common)
    if mask is not None:
      logits = jnp.where(mask, logits, 0.0)
    to_query = jnp.einsum("tls,tsh->tlh", logits, key)
    to_key = jnp.einsum("tls,tlh->tsh", logits, query)
    return to_query, to_key, to_value

  return *jax.lax.map(one, (kept, given)), None


_mix.defvjp(_forward, _backward)


def _logits(query, key, mask):
  logits = jnp.einsum("tlh,tsh->tls", query, key)
  if mask is None:
    return logits
  return jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
