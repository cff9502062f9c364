"""BERT-style text encoder (Devlin et al. 2019), bidirectional, causal or prefix.

Shape letters: B batch, L length, D width, V vocabulary.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.models import tokens as tokens_lib
from vlp_jax.nn import attention as attention_lib
from vlp_jax.nn import axes
from vlp_jax.nn import block
from vlp_jax.nn import dropout as dropout_lib
from vlp_jax.nn import embed
from vlp_jax.nn import linear
from vlp_jax.nn import pool as pool_lib
from vlp_jax.ops import mask as mask_lib
from vlp_jax.ops import posembed


class Encoder(nn.Module):
  """Ids [B, L] -> Tokens of [B, L, D].

  Attributes:
    vocab: the tokenizer's vocabulary, handed in by `build`; its size is the table's.
    width, depth, num_heads, mlp_dim: sizes of the stack. Depth 0 only embeds the
      words, for a fusion whose layers do the rest.
    length: rows of the position table, at least the tokenizer's length.
    posemb: "learned" starts at random; "learned_sincos" where Vaswani et al. 2017
      (section 3.5) stay, so that to look one word back is soon learned. "none": there
      is no such table, for a fusion that knows distances.
    types: rows of the token-type table, of which row 0 is used (BERT has 2); 0: none.
    norm: "post" with a norm on the embeddings (BERT) or "pre" with one at the end.
    norm_pre: one on the embeddings before a "pre" stack as well (BLOOM). Without it,
      small word vectors drown in what the first block adds, and MLM learns slowly.
    attention: which tokens see which, where the caller does not say.
    class_token: a learned token behind the text, whose norm is the text's vector; the
      tokens are then returned as the blocks leave them (CoCa). "shifted" as in
      open_clip, whose mask counts it as the first: padding is masked one late.
    first_position: row of the position table that the first token has. RoBERTa's is 2,
      pad + 1: there a padded token has the row before, and counts for no position.
    see_padding: padding is read as words are, and "last" is the end of the row
      (SigLIP); the encoded tokens then have no mask.
    keep_raw: the Tokens hold those before the last norm too.
  """

  vocab: Any
  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  length: int
  posemb: Literal["learned", "learned_sincos", "none"] = "learned"
  types: int = 2
  pool: pool_lib.Kind = "first"
  attention: mask_lib.Attention = "bidirectional"
  class_token: Literal["shifted", "plain"] | None = None
  first_position: int = 0
  see_padding: bool = False
  keep_raw: bool = False
  norm: block.Norm = "post"
  norm_eps: float = 1e-12
  norm_pre: bool = False
  act: block.Activation = "gelu"
  dropout: float = 0.0
  dropout_attention: float = 0.0
  drop_path: float = 0.0
  backend: attention_lib.Backend = "auto"
  init_std: float | None = 0.02
  remat: block.Remat = "none"
  unroll: int = 1
  dtype: str = "float32"

  # It is called with `whole` too.
  picks = True

  def setup(self):
    width = self.width
    self.word = embed.Embed(self.vocab.size, width)
    if self.posemb != "none":
      start = posembed.sincos1d if self.posemb == "learned_sincos" else None
      self.position = embed.Embed(self.length, width, axis="pos", start=start)
    if self.types:
      self.type = embed.Embed(self.types, width, axis="pos")
    if self.depth or self.norm == "post":
      self.outer_norm = linear.LayerNorm(self.norm_eps, self.dtype, name="norm")
    if self.norm_pre:
      if self.norm == "post":
        raise ValueError(
          'model.text.norm_pre=True: norm="post" has a norm on the embeddings as it is.'
        )
      self.first_norm = linear.LayerNorm(self.norm_eps, self.dtype, name="norm_pre")
    if self.class_token:
      small = axes.boxed(axes.kernel_init(0.01, width), "embed")
      self.cls = self.param("cls", small, (width,))
    self.drop = dropout_lib.Dropout(self.dropout)
    if self.depth:
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
    attention: mask_lib.Attention | mask_lib.Writing | None = None,
    prefix: jax.Array | None = None,
    types: jax.Array | None = None,
    memory: tokens_lib.Tokens | None = None,
    whole: bool = True,
    train: bool = False,
  ) -> tokens_lib.Tokens:
    """Encodes ids; with a memory, every layer attends to it (a decoder's).

    Args:
      ids: int32 [B, L]. mask: bool [B, L].
      attention: None: the module's own. Writing: the ids are the words that come now
        of a text that is being written.
      prefix: int32 [B] for attention="prefix".
      types: int32 [B, L], rows of the token-type table; None: all 0.
      memory: Tokens of x [B, S, D'].
      whole: all tokens are wanted; else what `pooled` takes of them is enough.
      train: drops out.
    """
    attention = self.attention if attention is None else attention
    writing = isinstance(attention, mask_lib.Writing)
    extra = self.first_position + (self.class_token is not None)
    count = attention.length if writing else ids.shape[1]
    if count + extra > self.length:
      raise ValueError(
        f"text of {count} tokens, but model.text.length={self.length}: raise it"
        f" to the tokenizer's length (and {extra} more)."
      )
    x, keys = self.word(ids), mask
    # What is written has no class token behind it yet, which no word sees anyway.
    classed = self.class_token and not writing
    if classed:
      x, keys = self._with_class(x, mask)
    if writing:
      places = attention.places(ids.shape[1]) + self.first_position
    else:
      places = self._positions(keys)
    if self.posemb != "none":
      x = x + self.position(places)
    if self.types:
      x = x + self.type(jnp.zeros((), jnp.int32) if types is None else types)
    x = self.outer_norm(x) if self.norm == "post" else x
    x = self.first_norm(x) if self.norm_pre else x
    x = self.drop(x, deterministic=not train)
    if self.see_padding:
      keys, mask = jnp.ones_like(keys), None
    seen = attention
    if not writing:
      seen = mask_lib.attention(keys, attention, prefix_B=prefix)
    other = other_seen = None
    if memory is not None:
      other = memory.x
      other_seen = mask_lib.attention(memory.mask, "bidirectional")
    at = None
    if not (whole or writing or self.class_token or self.keep_raw):
      at = pool_lib.place(x.shape[1], mask, self.pool)
    if self.depth:
      x = block.run(self, x, seen, other, other_seen, at=at, train=train)
      mask = mask if at is None else None
    if writing and self.class_token:
      return tokens_lib.Tokens(x, mask)
    if classed:
      pooled = self.outer_norm(x[:, -1]) if self.norm == "pre" else x[:, -1]
      return tokens_lib.Tokens(x[:, :-1], mask, pooled)
    raw = x if self.keep_raw else None
    if self.depth and self.norm == "pre":
      x = self.outer_norm(x)
    return tokens_lib.Tokens(x.astype(self.dtype), mask, raw=raw)

  def _with_class(self, x, mask):
    """Words [B, L, D] and the class token; mask bool [B, L + 1]."""
    cls = jnp.broadcast_to(self.cls.astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
    real = jnp.ones_like(mask[:, :1])
    parts = [real, mask] if self.class_token == "shifted" else [mask, real]
    return jnp.concatenate([x, cls], axis=1), jnp.concatenate(parts, axis=1)

  def _positions(self, mask):
    """int32 [L] or [B, L], rows of the position table."""
    if not self.first_position:
      return jnp.arange(mask.shape[1])
    # transformers' create_position_ids_from_input_ids: only real tokens are counted.
    return jnp.cumsum(mask, axis=1) * mask + self.first_position - 1

  def word_logits(self, x: jax.Array) -> jax.Array:
    """x [..., D] -> float32 [..., V], by the table of word embeddings."""
    return self.word.attend(x)

  def pooled(self, tokens: tokens_lib.Tokens) -> jax.Array:
    """[B, L, D] -> [B, D]."""
    if tokens.pooled is not None:
      return tokens.pooled
    if self.pool == "map":
      return self.pooler(tokens.x, tokens.mask)
    return pool_lib.pool(tokens.x, tokens.mask, self.pool)
