"""From a sequence of tokens to one vector.

Shape letters: B batch, L length, D width.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.nn import attention as attention_lib
from vlp_jax.nn import axes
from vlp_jax.nn import block
from vlp_jax.nn import linear

Kind = Literal["first", "last", "mean", "map"]


def pool(x: jax.Array, mask: jax.Array | None, kind: Kind) -> jax.Array:
  """[B, L, D] -> [B, D] without parameters.

  "first" is the class token; "last" the last real token (CLIP's end of text); "mean"
  averages the real tokens.
  """
  if (at := place(x.shape[1], mask, kind)) is not None:
    return block.pick(x, at)[:, 0]
  if mask is None:
    return x.mean(axis=1)
  weight = mask[..., None].astype(jnp.float32)
  return ((x * weight).sum(axis=1) / weight.sum(axis=1)).astype(x.dtype)


def place(length: int, mask: jax.Array | None, kind: Kind) -> block.Place:
  """Where, of so many tokens, the one that `pool` takes stands; None: it takes more."""
  if kind == "first":
    return 0
  if kind == "last":
    last = length - 1
    return last if mask is None else last - jnp.argmax(mask[:, ::-1], axis=1)
  return None


class QueryPool(nn.Module):
  """Learned queries attend to the tokens: [B, L, D'] -> [B, Q, D].

  Attentional pooling of CoCa (Yu 2022, section 3.2), as open_clip has it
  (transformer.py AttentionalPooler): norms on both sides, no MLP.

  Attributes:
    queries: Q. width: D.
  """

  queries: int
  width: int
  num_heads: int
  norm_eps: float = 1e-5
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = axes.boxed(nn.initializers.normal(1.0), None, "embed")
    query = self.param("query", init, (self.queries, self.width))
    query = linear.LayerNorm(self.norm_eps, self.dtype, name="norm_query")(query)
    x = linear.LayerNorm(self.norm_eps, self.dtype, name="norm")(x)
    query = jnp.broadcast_to(query[None], (x.shape[0], *query.shape))
    return attention_lib.Attention(
      self.num_heads, init_std=None, dtype=self.dtype, name="attn"
    )(query, x)


class MapPool(nn.Module):
  """kind "map": a learned query attends to the tokens, and an MLP.

  Multi-head attention pooling of Zhai et al. 2022 (big_vision, vit.py MAPHead).
  """

  num_heads: int
  mlp_dim: int
  norm_eps: float = 1e-6
  dtype: str = "float32"
  act: block.Activation = "gelu"

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """[B, L, D] -> [B, D]."""
    width = x.shape[-1]
    init = axes.boxed(nn.initializers.xavier_uniform(), None, "embed")
    probe = self.param("probe", init, (1, width)).astype(self.dtype)
    probe = jnp.broadcast_to(probe[None], (x.shape[0], 1, width))
    keys = None if mask is None else mask[:, None, None, :]
    y = attention_lib.Attention(
      self.num_heads, init_std=None, dtype=self.dtype, name="attn"
    )(probe, x, keys)
    z = linear.LayerNorm(self.norm_eps, self.dtype, name="norm")(y)
    mlp = block.Mlp(self.mlp_dim, self.act, init_std=None, dtype=self.dtype, name="mlp")
    return (y + mlp(z))[:, 0]


class TanhPool(nn.Module):
  """BERT's pooler: a linear layer and tanh on the first token, [B, L, D] -> [B, D]."""

  width: int
  init_std: float | None = 0.02
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape, names = (self.width, self.width), ("embed", "proj")
    dense = linear.Linear(
      "BD,DE->BE",
      shape,
      names,
      init_std=self.init_std,
      dtype=self.dtype,
      name="dense",
    )
    return jnp.tanh(dense(x[:, 0]))
