"""Two streams that attend to each other in every layer (METER, LXMERT).

METER: Dou et al. 2022, section 3.1 of https://arxiv.org/abs/2111.02387; official
meter/modules/meter_module.py `infer`, bert_model.py `BertCrossLayer`.

Shape letters: B batch, L text length, S image tokens, D width, E width of a tower.
"""

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


class Pair(nn.Module):
  """One layer: a block of the text and one of the image, each with the other as memory.

  Both read the pair as it came in: neither sees what the other made of this layer.
  Fields are those of `block.Block`, and so is the call, where x is (text, image), mask
  is (of text among itself, of text for the image), and memory is None.
  """

  num_heads: int
  mlp_dim: int
  norm: block.Norm = "post"
  norm_eps: float = 1e-12
  act: block.Activation = "gelu"
  dropout: float = 0.0
  dropout_attention: float = 0.0
  backend: attention_lib.Backend = "auto"
  init_std: float | None = 0.02
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x, own, mask, memory, memory_mask, train):
    text, image = x
    seen, keys = mask
    fields = block.common_fields(self, block.Block)
    new_text, _ = block.Block(**fields, name="text")(
      text, own, seen, image, memory_mask, train
    )
    new_image, _ = block.Block(**fields, name="image")(
      image, own, memory_mask, text, keys, train
    )
    return (new_text, new_image), None


class Fusion(nn.Module):
  """Text Tokens [B, L, E] and image Tokens [B, S, E'] -> Fused of width D.

  Each stream is projected to D and gets the embedding of its type; `pooled` [B, 2 D] is
  a tanh layer on the first token of the text, and one on that of the image.

  Attributes:
    text_width, image_width: E, E', handed in by `build`.
    width: D; None: as the text.
    depth, num_heads, mlp_dim: sizes of both stacks.
    types: rows of the type table: 0 text, 1 the image, 2 a second one (NLVR2).
  """

  text_width: int
  image_width: int
  depth: int
  num_heads: int
  mlp_dim: int
  width: int | None = None
  types: int = 2
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
    """(of the fused tokens, of the pooled pair), for a text of this width."""
    width = self.width or text_width
    return width, 2 * width

  def setup(self):
    width = self.width or self.text_width
    common = dict(init_std=self.init_std, dtype=self.dtype)

    def project(into, name):
      shape, names = (into, width), ("embed", "proj")
      return linear.Linear("BLE,ED->BLD", shape, names, name=name, **common)

    self.text_project = project(self.text_width, "text_proj")
    self.image_project = project(self.image_width, "image_proj")
    self.type = embed.Embed(self.types, width, axis="pos", dtype=self.dtype)
    self.blocks = block.stack(self, Pair)
    if self.norm == "pre":
      self.text_norm = linear.LayerNorm(self.norm_eps, self.dtype)
      self.image_norm = linear.LayerNorm(self.norm_eps, self.dtype)
    self.text_pool = pool_lib.TanhPool(width, **common)
    self.image_pool = pool_lib.TanhPool(width, **common)

  def __call__(
    self,
    image: tokens_lib.Tokens,
    text: tokens_lib.Tokens,
    *,
    attention: mask_lib.Attention = "bidirectional",
    image_type: int | jax.Array = 1,
    train: bool = False,
  ) -> tokens_lib.Fused:
    x = self.text_project(text.x) + self.type(jnp.int32(0))
    y = self.image_project(image.x) + self.type(jnp.int32(image_type))
    seen = mask_lib.attention(text.mask, attention)
    keys = mask_lib.attention(text.mask, "bidirectional")
    patches = mask_lib.attention(image.mask, "bidirectional")
    own = block.Own(block.drop_rates(self))
    (x, y), _ = self.blocks((x, y), own, (seen, keys), None, patches, train)
    if self.norm == "pre":
      x, y = self.text_norm(x), self.image_norm(y)
    pooled = jnp.concatenate([self.text_pool(x), self.image_pool(y)], axis=-1)
    return tokens_lib.Fused(x, text.mask, tokens_lib.Tokens(y, image.mask), pooled)
