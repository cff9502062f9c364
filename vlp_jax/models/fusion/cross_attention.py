"""Text tokens that attend to image tokens in every layer (ALBEF, CoCa).

ALBEF: the upper half of BERT with cross-attention, https://arxiv.org/abs/2107.07651.
"""

import flax.linen as nn

from vlp_jax.models import tokens as tokens_lib
from vlp_jax.nn import attention as attention_lib
from vlp_jax.nn import block
from vlp_jax.ops import mask as mask_lib


class Fusion(nn.Module):
  """Text Tokens [B, L, D] fused with image Tokens [B, S, D'] -> Tokens [B, L, D].

  Attributes:
    depth, num_heads, mlp_dim: sizes of the stack; its width is the text's.
    norm: "post" (BERT) or "pre", which adds a norm at the end.
    mlp_before, norm_memory, bias: of each layer, as of `block.Block`.
  """

  depth: int
  num_heads: int
  mlp_dim: int
  norm: block.Norm = "post"
  norm_eps: float = 1e-12
  act: block.Activation = "gelu"
  dropout: float = 0.0
  dropout_attention: float = 0.0
  drop_path: float = 0.0
  mlp_before: bool = False
  norm_memory: bool = False
  bias: bool = True
  backend: attention_lib.Backend = "auto"
  init_std: float | None = 0.02
  remat: block.Remat = "none"
  unroll: int = 1
  dtype: str = "float32"

  # The text comes encoded.
  encodes_text = False
  encodes_image = False

  def widths(self, text_width: int) -> tuple[int, int]:
    """(of the fused tokens, of the first of them, which stands for the pair)."""
    return text_width, text_width

  def setup(self):
    self.blocks = block.stack(self)
    self.last_norm = block.last_norm(self)

  def remember(self, image: tokens_lib.Tokens) -> tokens_lib.Tokens:
    """With the keys and values that all layers ask for: to be fused several times."""
    if self.norm_memory:
      return image  # Of which each layer has another.
    return image.replace(keys=block.remember(self, image.x))

  def __call__(
    self,
    image: tokens_lib.Tokens,
    text: tokens_lib.Tokens,
    *,
    attention: mask_lib.Attention | mask_lib.Writing = "bidirectional",
    train: bool = False,
  ) -> tokens_lib.Tokens:
    seen = attention
    if not isinstance(attention, mask_lib.Writing):
      seen = mask_lib.attention(text.mask, attention)
    patches = mask_lib.attention(image.mask, "bidirectional")
    given = (seen, image.x, patches)
    x = block.run(self, text.x, *given, keys=image.keys, train=train)
    return tokens_lib.Tokens(self.last_norm(x), text.mask)
