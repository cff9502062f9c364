"""BERT-style text encoder (Devlin et al. 2019), bidirectional, causal or prefix.

Shape letters: B batch, L length, D width, V vocabulary.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.models import tokens as tokens_lib
from vlp_jax.nn import attention as attention_lib
from vlp_jax.nn import block
from vlp_jax.nn import embed
from vlp_jax.nn import linear
from vlp_jax.nn import pool as pool_lib
from vlp_jax.ops import mask as mask_lib


class Encoder(nn.Module):
  """Ids [B, L] -> Tokens of [B, L, D].

  Attributes:
    vocab: the tokenizer's vocabulary, handed in by `build`; its size is the table's.
    width, depth, num_heads, mlp_dim: sizes of the stack.
    length: rows of the position table, at least the tokenizer's length.
    types: rows of the token-type table, of which row 0 is used (BERT has 2); 0: none.
    norm: "post" with a norm on the embeddings (BERT) or "pre" with one at the end.
    attention: which tokens see which, where the caller does not say.
    see_padding: padding is read as words are, and "last" is the end of the row
      (SigLIP); the encoded tokens then have no mask.
  """

  vocab: Any
  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  length: int
  types: int = 2
  pool: pool_lib.Kind = "first"
  attention: mask_lib.Attention = "bidirectional"
  see_padding: bool = False
  norm: block.Norm = "post"
  norm_eps: float = 1e-12
  act: block.Activation = "gelu"
  dropout: float = 0.0
  dropout_attention: float = 0.0
  drop_path: float = 0.0
  backend: attention_lib.Backend = "auto"
  init_std: float | None = 0.02
  remat: block.Remat = "none"
  unroll: int = 1
  dtype: str = "float32"

  def setup(self):
    width = self.width
    self.word = embed.Embed(self.vocab.size, width)
    self.position = embed.Embed(self.length, width, axis="pos")
    if self.types:
      self.type = embed.Embed(self.types, width, axis="pos")
    self.outer_norm = linear.LayerNorm(self.norm_eps, self.dtype, name="norm")
    self.drop = nn.Dropout(self.dropout)
    self.blocks = block.stack(self)
    if self.pool == "map":
      self.pooler = pool_lib.MapPool(
        self.num_heads,
        self.mlp_dim,
        self.norm_eps,
        self.dtype,
        self.act,
        name="map_pool",
      )

  def __call__(
    self,
    ids: jax.Array,
    mask: jax.Array,
    *,
    attention: mask_lib.Attention | None = None,
    prefix: jax.Array | None = None,
    train: bool = False,
  ) -> tokens_lib.Tokens:
    """ids int32 [B, L], mask bool [B, L]; prefix int32 [B] for attention="prefix"."""
    if ids.shape[1] > self.length:
      raise ValueError(
        f"text of {ids.shape[1]} tokens, but model.text.length={self.length}: raise it"
        " to the tokenizer's length."
      )
    x = self.word(ids) + self.position(jnp.arange(ids.shape[1]))
    if self.types:
      x = x + self.type(jnp.zeros((), jnp.int32))
    x = self.outer_norm(x) if self.norm == "post" else x
    x = self.drop(x, deterministic=not train)
    if self.see_padding:
      mask = jnp.ones_like(mask)
    seen = mask_lib.attention(mask, attention or self.attention, prefix_B=prefix)
    x = block.run(self, x, seen, train=train)
    x = self.outer_norm(x) if self.norm == "pre" else x
    mask = None if self.see_padding else mask
    return tokens_lib.Tokens(x.astype(self.dtype), mask)

  def word_logits(self, x: jax.Array) -> jax.Array:
    """x [..., D] -> float32 [..., V], by the table of word embeddings."""
    return self.word.attend(x)

  def pooled(self, tokens: tokens_lib.Tokens) -> jax.Array:
    """[B, L, D] -> [B, D]."""
    if self.pool == "map":
      return self.pooler(tokens.x, tokens.mask)
    return pool_lib.pool(tokens.x, tokens.mask, self.pool)
