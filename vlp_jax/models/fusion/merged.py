"""One stream: words and patches are one sequence, which attends to itself (ViLT, VLP).

ViLT: Kim et al. 2021, section 3.1 of https://arxiv.org/abs/2102.03334; official
vilt/modules/vilt_module.py `infer`.

Shape letters: B batch, L text length, S image tokens, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.models import tokens as tokens_lib
from vlp_jax.models.fusion import widths
from vlp_jax.nn import attention as attention_lib
from vlp_jax.nn import block
from vlp_jax.nn import embed
from vlp_jax.nn import pool as pool_lib
from vlp_jax.ops import mask as mask_lib


class Fusion(nn.Module):
  """Text Tokens [B, L, D] and image Tokens [B, S, D] -> Fused.

  Each token gets the embedding of its type, unless the towers give it (UNITER's do,
  within their norms); `pooled` [B, D] is a tanh layer on the
  text's first token.

  Attributes:
    text_width, image_width: D of both, handed in by `build`.
    depth, num_heads, mlp_dim: sizes of the stack.
    types: rows of the type table: 0 text, 1 the image, 2 a second one (NLVR2). 0: none.
    norm: "pre" (ViT), with a norm at the end, or "post" (BERT).
  """

  text_width: int
  image_width: int
  depth: int
  num_heads: int
  mlp_dim: int
  types: int = 2
  norm: block.Norm = "pre"
  norm_eps: float = 1e-6
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
    widths.check_equal(self, 'model.fusion.type="merged" is one stream')
    if self.types:
      self.type = embed.Embed(self.types, width, axis="pos", dtype=self.dtype)
    self.blocks = block.stack(self)
    self.last_norm = block.last_norm(self)
    self.pooler = pool_lib.TanhPool(
      width, init_std=self.init_std, dtype=self.dtype, name="pool"
    )

  def __call__(
    self,
    image: tokens_lib.Tokens,
    text: tokens_lib.Tokens,
    *,
    attention: mask_lib.Attention = "bidirectional",
    image_type: int | jax.Array = 1,
    train: bool = False,
  ) -> tokens_lib.Fused:
    length = text.x.shape[1]
    both = jnp.concatenate([text.mask, image.real], axis=1)
    seen = mask_lib.attention(both, "bidirectional")
    if attention != "bidirectional":
      raise ValueError(
        'model.fusion.type="merged" fuses with attention="bidirectional" only, not'
        f" {attention!r}: words and patches see each other."
      )
    kinds = (0, image_type)
    parts = [text.x, image.x]
    if self.types:
      pairs = zip(parts, kinds, strict=True)
      parts = [part + self.type(jnp.int32(kind)) for part, kind in pairs]
    x = jnp.concatenate(parts, axis=1)
    x = self.last_norm(block.run(self, x, seen, train=train))
    return tokens_lib.Fused(
      x[:, :length],
      text.mask,
      tokens_lib.Tokens(x[:, length:], image.mask),
      self.pooler(x),
    )
