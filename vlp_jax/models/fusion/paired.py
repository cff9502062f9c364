"""Text that attends to one image and to another, layer by layer (NLVR2).

ALBEF section 4 of https://arxiv.org/abs/2107.07651 and the official model_nlvr.py: each
layer of the fusion stack becomes two, one for each image, whose cross-attentions share
the projections of keys and values.
"""

import flax.linen as nn
import jax

from vlp_jax.models import tokens as tokens_lib
from vlp_jax.nn import attention as attention_lib
from vlp_jax.nn import block
from vlp_jax.nn import linear
from vlp_jax.ops import mask as mask_lib


class Pair(nn.Module):
  """Two blocks, each with its own image, and one projection of keys and values.

  Fields and call are those of `block.Block`, where memory and mask are pairs.
  """

  num_heads: int
  mlp_dim: int
  norm: block.Norm = "pre"
  norm_eps: float = 1e-6
  act: block.Activation = "gelu"
  dropout: float = 0.0
  dropout_attention: float = 0.0
  backend: attention_lib.Backend = "auto"
  init_std: float | None = 0.02
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x, own, mask, memory, memory_mask, train):
    """memory: two of [B, S, D']; memory_mask: two of bool [B, 1, 1, S] or None."""
    heads = (self.num_heads, x.shape[-1] // self.num_heads)
    key, value = (
      linear.Linear(
        "BSD,DNH->BSNH",
        (memory[0].shape[-1], *heads),
        ("embed", "heads", "head_dim"),
        init_std=self.init_std,
        dtype=self.dtype,
        name=name,
      )
      for name in ("key", "value")
    )
    fields = block.common_fields(self, block.Block)
    for name, image, seen in zip(("first", "second"), memory, memory_mask, strict=True):
      shared = attention_lib.KeyValue(key(image), value(image))
      x, _ = block.Block(**fields, name=name)(x, own, mask, shared, seen, train)
    return x, None


class Fusion(nn.Module):
  """Text Tokens [B, L, D] fused with two images' Tokens [B, S, D'] -> [B, L, D].

  Attributes:
    depth: pairs of layers; ALBEF's 6 pairs are 12 layers. The rest is as in
      `cross_attention.Fusion`.
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
    self.blocks = block.stack(self, Pair)
    self.last_norm = block.last_norm(self)

  def __call__(
    self,
    image: tuple[tokens_lib.Tokens, tokens_lib.Tokens],
    text: tokens_lib.Tokens,
    *,
    attention: mask_lib.Attention = "bidirectional",
    train: bool = False,
  ) -> tokens_lib.Tokens:
    if not isinstance(image, tuple) or len(image) != 2:
      raise ValueError(
        'model.fusion.type="paired" fuses two images with a text: use it with an'
        " objective of two images, objectives.classify.images=2."
      )
    seen = mask_lib.attention(text.mask, attention)
    patches = tuple(mask_lib.attention(one.mask, "bidirectional") for one in image)
    memory: tuple[jax.Array, ...] = tuple(one.x for one in image)
    x = block.run(self, text.x, seen, memory, patches, train=train)
    return tokens_lib.Tokens(self.last_norm(x), text.mask)
