"""One BERT over [CLS] image [SEP] text [SEP], read both ways or from the left (VLP).

Zhou et al. 2020, https://arxiv.org/abs/1909.11059, section 3 and figure 2; official
pytorch_pretrained_bert/modeling.py BertModel, vlp/seq2seq_loader.py Preprocess4Seq2seq.

Shape letters: B batch, L text length, S image tokens, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.models import tokens as tokens_lib
from vlp_jax.models.fusion import widths
from vlp_jax.nn import attention as attention_lib
from vlp_jax.nn import block
from vlp_jax.nn import dropout as dropout_lib
from vlp_jax.nn import embed
from vlp_jax.nn import linear
from vlp_jax.nn import pool as pool_lib
from vlp_jax.ops import mask as mask_lib


class Fusion(nn.Module):
  """Words of `models/words.py` [B, 1 + L, D] and image Tokens [B, S, D] -> Fused.

  Of the fused text, [CLS] and the words are returned [B, L, D], as the ids have them;
  `pooled` [B, D] is a tanh layer on [CLS].

  A row that is read from the left is UniLM's "sequence to sequence": [CLS], the image
  and [SEP] see each other, each word them and the words before it. Its tokens have
  other types, by which the layers know.

  Attributes:
    text_width, image_width: D of both, handed in by `build`.
    depth, num_heads, mlp_dim: sizes of the stack.
    types: rows of the type table, 6: of the image and of the text they are 0 and 1
      where all see all, 4 and 5 in a row read from the left. 2: 0 and 1 in both (the
      official code without --new_segment_ids).
    dropout: of the embeddings and the layers.
  """

  text_width: int
  image_width: int
  depth: int
  num_heads: int
  mlp_dim: int
  types: int = 6
  norm: block.Norm = "post"
  norm_eps: float = 1e-5
  act: block.Activation = "gelu"
  dropout: float = 0.0
  dropout_attention: float = 0.0
  drop_path: float = 0.0
  backend: attention_lib.Backend = "auto"
  init_std: float | None = 0.02
  remat: block.Remat = "none"
  unroll: int = 1
  dtype: str = "float32"

  # The text comes embedded, and is encoded together with an image only.
  encodes_text = False
  encodes_image = False

  def widths(self, text_width: int) -> tuple[int, int]:
    """(of the fused tokens, of the pooled pair), for a text of this width."""
    return text_width, text_width

  def setup(self):
    width = self.text_width
    widths.check_equal(self, 'model.fusion.type="stream" is one stream')
    if self.types not in (2, 6):
      raise ValueError(f"model.fusion.types={self.types}: want 6, or 2.")
    if self.norm != "post":
      raise ValueError(
        f'model.fusion.norm={self.norm!r}: this stack is BERT\'s, "post".'
      )
    self.type = embed.Embed(self.types, width, axis="pos", dtype=self.dtype)
    self.first_norm = linear.LayerNorm(self.norm_eps, self.dtype, name="norm")
    self.drop = dropout_lib.Dropout(self.dropout)
    self.blocks = block.stack(self)
    self.pooler = pool_lib.TanhPool(
      width, init_std=self.init_std, dtype=self.dtype, name="pool"
    )

  def __call__(
    self,
    image: tokens_lib.Tokens,
    text: tokens_lib.Tokens,
    *,
    attention: mask_lib.Attention | jax.Array = "bidirectional",
    train: bool = False,
  ) -> tokens_lib.Fused:
    """attention: "bidirectional", "causal", or bool [B], true where it is "causal"."""
    batch, count = image.x.shape[:2]
    causal = self._causal(attention, batch)
    # [CLS], the image, [SEP], words
    x = jnp.concatenate([text.x[:, :1], image.x, text.x[:, 1:]], axis=1)
    keys = jnp.concatenate([text.mask[:, :1], image.real, text.mask[:, 1:]], axis=1)
    at = jnp.arange(x.shape[1])
    kinds = (at >= count + 2).astype(jnp.int32) + jnp.zeros((batch, 1), jnp.int32)
    if self.types == 6:
      kinds = kinds + jnp.where(causal, 4, 0)[:, None]
    x = self.first_norm(x + self.type(kinds))
    x = self.drop(x, deterministic=not train)
    # All of a row is the prefix where all see all.
    prefix = jnp.where(causal, count + 2, x.shape[1])
    seen = mask_lib.attention(keys, "prefix", prefix_B=prefix)
    x = block.run(self, x, seen, train=train)
    words = jnp.concatenate([x[:, :1], x[:, count + 2 :]], axis=1)
    mask = jnp.concatenate([text.mask[:, :1], text.mask[:, 2:]], axis=1)
    return tokens_lib.Fused(
      words, mask, tokens_lib.Tokens(x[:, 1 : count + 1], image.mask), self.pooler(x)
    )

  def _causal(self, attention, batch):
    """bool [B]."""
    if not isinstance(attention, str):
      if attention.shape != (batch,):
        raise ValueError(
          f"attention {list(attention.shape)}: want bool [{batch}], one for each row."
        )
      return attention
    if attention not in ("bidirectional", "causal"):
      raise ValueError(
        'model.fusion.type="stream" is read "bidirectional" or "causal", not'
        f" {attention!r}."
      )
    return jnp.full((batch,), attention == "causal")
