"""Words of a stream in which the image stands between the first word and the others.

[CLS] image [SEP] text [SEP]: VLP (Zhou et al. 2020, https://arxiv.org/abs/1909.11059,
section 3; official pytorch_pretrained_bert/modeling.py BertEmbeddings). The layers, the
types and the norm of the embeddings are those of the fusion (`fusion/stream.py`).

Shape letters: B batch, L text length, D width, V vocabulary.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.models import tokens as tokens_lib
from vlp_jax.nn import embed
from vlp_jax.ops import mask as mask_lib


class Encoder(nn.Module):
  """Ids [B, L] -> Tokens of [B, 1 + L, D]: [CLS], the [SEP] behind the image, words.

  Attributes:
    vocab: the tokenizer's vocabulary, handed in by `build`.
    width: D. num_heads, mlp_dim: of the fusion's layers, unless it says its own.
    length: rows of the position table, at least 1 + `between` + L.
    between: so many tokens of the image stand behind [CLS]; the words' positions go on
      behind them.
  """

  vocab: Any
  width: int
  num_heads: int
  mlp_dim: int
  length: int
  between: int
  dtype: str = "float32"

  def setup(self):
    if self.vocab.sep is None:
      raise ValueError(
        'model.text.type="words": this tokenizer\'s vocabulary has no piece that'
        " separates: use one of BERT's (wordpiece) or train one (sentencepiece)."
      )
    self.word = embed.Embed(self.vocab.size, self.width, dtype=self.dtype)
    self.position = embed.Embed(self.length, self.width, axis="pos", dtype=self.dtype)

  def __call__(
    self,
    ids: jax.Array,
    mask: jax.Array,
    *,
    attention: mask_lib.Attention | None = None,
    train: bool = False,
  ) -> tokens_lib.Tokens:
    """ids int32 [B, L], which begin with [CLS]; mask bool [B, L].

    `attention` and `train` change nothing: words are looked up.
    """
    del attention, train
    most = 1 + self.between + ids.shape[1]
    if most > self.length:
      raise ValueError(
        f"text of {ids.shape[1]} tokens behind {self.between} of the image, but"
        f" model.text.length={self.length}: raise it to {most}."
      )
    sep = jnp.full_like(ids[:, :1], self.vocab.sep)
    ids = jnp.concatenate([ids[:, :1], sep, ids[:, 1:]], axis=1)
    mask = jnp.concatenate([mask[:, :1], mask[:, :1], mask[:, 1:]], axis=1)
    at = jnp.arange(ids.shape[1])
    at = jnp.where(at == 0, 0, at + self.between)
    return tokens_lib.Tokens(self.word(ids) + self.position(at), mask)

  def word_logits(self, x: jax.Array) -> jax.Array:
    """x [..., D] -> float32 [..., V], by the table of word embeddings."""
    return self.word.attend(x)

  def pooled(self, tokens: tokens_lib.Tokens) -> jax.Array:
    """[B, 1 + L, D] -> [B, D], the first token."""
    return tokens.x[:, 0]
