"""One stream on top of two towers: both are mapped to its width, behind a class token.

FLAVA: Singh et al. 2022, section 3.1 of https://arxiv.org/abs/2112.04482;
transformers modeling_flava.py FlavaModel, FlavaMultimodalModel.

Shape letters: B batch, L text length, S image tokens, D width, W of a tower.
"""

import flax.linen as nn
import jax.numpy as jnp

from vlp_jax.models import tokens as tokens_lib
from vlp_jax.nn import attention as attention_lib
from vlp_jax.nn import axes
from vlp_jax.nn import block
from vlp_jax.nn import linear
from vlp_jax.ops import mask as mask_lib


class Fusion(nn.Module):
  """Text Tokens [B, L, W], image Tokens [B, S, W'] -> Fused of width D.

  The sequence is class token, image, text, without positions or types of its own.
  `pooled` [B, D] is the class token. Where the towers keep the tokens before their last
  norm (`keep_raw`), these are read, as FLAVA does.

  Attributes:
    text_width, image_width: W, W', handed in by `build`.
    width: D; None: as the text.
    depth, num_heads, mlp_dim: sizes of the stack.
  """

  text_width: int
  image_width: int
  depth: int
  num_heads: int
  mlp_dim: int
  width: int | None = None
  norm: block.Norm = "pre"
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

  # The text comes encoded.
  encodes_text = False
  encodes_image = False

  def widths(self, text_width: int) -> tuple[int, int]:
    """(of the fused tokens, of the pooled pair), for a text of this width."""
    width = self.width or text_width
    return width, width

  def setup(self):
    width = self.width or self.text_width

    def bridge(into, name):
      return linear.Linear(
        "BLD,DE->BLE",
        (into, width),
        ("embed", "proj"),
        init_std=self.init_std,
        dtype=self.dtype,
        name=name,
      )

    self.from_image = bridge(self.image_width, "image")
    self.from_text = bridge(self.text_width, "text")
    small = axes.boxed(axes.kernel_init(0.02, width), "embed")
    self.cls = self.param("cls", small, (width,))
    self.blocks = block.stack(self)
    self.last_norm = block.last_norm(self)

  def __call__(
    self,
    image: tokens_lib.Tokens,
    text: tokens_lib.Tokens,
    *,
    attention: mask_lib.Attention = "bidirectional",
    train: bool = False,
  ) -> tokens_lib.Fused:
    if attention != "bidirectional":
      raise ValueError(
        'model.fusion.type="bridged" fuses with attention="bidirectional" only, not'
        f" {attention!r}: words and patches see each other."
      )
    patches = self.from_image(image.x if image.raw is None else image.raw)
    words = self.from_text(text.x if text.raw is None else text.raw)
    rows, count, width = patches.shape
    cls = jnp.broadcast_to(self.cls.astype(patches.dtype), (rows, 1, width))
    both = [jnp.ones((rows, 1), bool), image.real, text.mask]
    x = jnp.concatenate([cls, patches, words], axis=1)
    seen = mask_lib.attention(jnp.concatenate(both, axis=1), "bidirectional")
    x = self.last_norm(block.run(self, x, seen, train=train))
    fused_image = tokens_lib.Tokens(x[:, 1 : 1 + count], image.mask)
    return tokens_lib.Fused(x[:, 1 + count :], text.mask, fused_image, x[:, 0])
