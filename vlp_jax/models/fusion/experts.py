"""One stack for images, texts and pairs, with an expert for each (VLMo, BEiT-3).

VLMo: Bao et al. 2021, section 3 of https://arxiv.org/abs/2111.02358; official
vlmo/modules/vlmo_module.py. BEiT-3: Wang et al. 2022, section 2.1 of
https://arxiv.org/abs/2208.10442; torchscale model/BEiT3.py.

Shape letters: B batch, L text length, S image tokens, D width.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.models import tokens as tokens_lib
from vlp_jax.models.fusion import widths
from vlp_jax.nn import attention as attention_lib
from vlp_jax.nn import block
from vlp_jax.nn import embed
from vlp_jax.nn import linear
from vlp_jax.nn import multiway
from vlp_jax.nn import pool as pool_lib
from vlp_jax.ops import mask as mask_lib


class Stack(nn.Module):
  """Layers of `nn/multiway.py`, scanned. Fields are those of `Fusion`.

  Attributes:
    pair_expert: see `multiway.Layer`.
    first_drop: of the first layer; `drop_path` is that of the last.
  """

  depth: int
  num_heads: int
  mlp_dim: int
  pair_expert: bool
  first_drop: float
  separate: bool
  subln: bool
  layer_scale: float | None
  distances: tuple[int, int] | None
  norm_eps: float
  act: block.Activation
  dropout: float
  dropout_attention: float
  drop_path: float
  backend: attention_lib.Backend
  init_std: float | None
  remat: block.Remat
  unroll: int
  dtype: str

  def setup(self):
    self.blocks = block.stack(self, multiway.Layer)

  def __call__(self, x, seen, train):
    own = block.Own(block.drop_rates(self, self.first_drop))
    return self.blocks(x, own, seen, None, None, train)[0]


class Fusion(nn.Module):
  """Embedded words [B, L, D], embedded patches [B, S, D], or both.

  Its layers are those of both encoders, too: `model.image` and `model.text` have
  depth 0 beside it. Of a pair it returns Fused, of one alone Tokens.

  Attributes:
    text_width, image_width: D of both, handed in by `build`.
    depth, num_heads, mlp_dim: sizes of the stack.
    pair_depth: so many of the last layers have an expert for pairs (VLMo: 2 of 12; 3 of
      BEiT-3's giant).
    separate, subln, layer_scale: see `nn/multiway.py`.
    distances: (patches along a side of the image, words of the longest text) of a table
      of biases by distance, in place of positions that are added (VLMo); None: none.
    types: rows of a type table, of which texts get row 0 and images row 1 (VLMo: 2); 0:
      none.
    pool: what stands for a pair: "image" its class token (BEiT-3), "tanh" a layer on
      the first token of the text (VLMo).
  """

  text_width: int
  image_width: int
  depth: int
  num_heads: int
  mlp_dim: int
  pair_depth: int = 0
  separate: bool = True
  subln: bool = True
  layer_scale: float | None = None
  distances: tuple[int, int] | None = None
  types: int = 0
  pool: Literal["image", "tanh"] = "image"
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

  # Both come embedded, and are encoded by these layers.
  encodes_text = True
  encodes_image = True
  reads = ("bidirectional",)

  def widths(self, text_width: int) -> tuple[int, int]:
    """(of the fused tokens, of the pooled pair), for a text of this width."""
    return text_width, text_width

  def setup(self):
    widths.check_equal(self, 'model.fusion.type="experts" is one stack')
    if not 0 <= self.pair_depth < self.depth:
      raise ValueError(
        f"model.fusion.pair_depth={self.pair_depth}: wants 0 or more, and less than"
        f" depth={self.depth}."
      )
    below = self.depth - self.pair_depth
    last = max(self.depth - 1, 1)
    rate = lambda at: self.drop_path * at / last
    fields = block.common_fields(self, Stack)
    fields |= dict(depth=below, pair_expert=False, first_drop=0.0)
    self.lower = Stack(**fields | dict(drop_path=rate(below - 1)))
    if self.pair_depth:
      fields |= dict(depth=self.pair_depth, pair_expert=True, first_drop=rate(below))
      self.upper = Stack(**fields)
    if self.types:
      self.type = embed.Embed(self.types, self.text_width, axis="pos", dtype=self.dtype)
    self.norms = {
      name: linear.LayerNorm(self.norm_eps, self.dtype, name=name)
      for name in (("norm_image", "norm_text") if self.separate else ("norm",))
    }
    if self.pool == "tanh":
      self.pooler = pool_lib.TanhPool(
        self.text_width, init_std=self.init_std, dtype=self.dtype, name="pool"
      )

  def __call__(
    self,
    image: tokens_lib.Tokens | None,
    text: tokens_lib.Tokens | None,
    *,
    attention: mask_lib.Attention = "bidirectional",
    train: bool = False,
  ) -> tokens_lib.Tokens | tokens_lib.Fused:
    """`image` None: the text alone; `text` None: the image alone.

    Of an image that was encoded before, the tokens that went in (`raw`) are read.
    """
    if attention != "bidirectional":
      raise ValueError(
        'model.fusion.type="experts" reads with attention="bidirectional" only, not'
        f" {attention!r}."
      )
    x = {}
    if image is not None:
      patches = image.x if image.raw is None else image.raw
      x["image"] = self._typed(patches, 1)
    if text is not None:
      x["text"] = self._typed(text.x, 0)
    streams = [tokens for tokens in (image, text) if tokens is not None]
    seen = None
    if any(tokens.mask is not None for tokens in streams):
      real = jnp.concatenate([tokens.real for tokens in streams], axis=1)
      seen = mask_lib.attention(real, "bidirectional")
    x = self._run(x, seen, train)
    if text is None:
      return tokens_lib.Tokens(x["image"], image.mask, raw=patches)
    words = tokens_lib.Tokens(x["text"], text.mask)
    if image is None:
      if self.is_initializing() and self.pool == "tanh":
        self.pooler(words.x)
      return words
    pooled = self.pooler(words.x) if self.pool == "tanh" else x["image"][:, 0]
    images = tokens_lib.Tokens(x["image"], image.mask)
    return tokens_lib.Fused(words.x, text.mask, images, pooled)

  def _typed(self, x: jax.Array, row: int) -> jax.Array:
    return x + self.type(jnp.int32(row)) if self.types else x

  def _run(self, x, seen, train):
    x = {name: stream.astype(self.dtype) for name, stream in x.items()}
    x = self.lower(x, seen, train)
    if self.pair_depth:
      x = self.upper(x, seen, train)
    if self.is_initializing():
      for norm in self.norms.values():
        norm(next(iter(x.values())))
    named = lambda name: self.norms[f"norm_{name}" if self.separate else "norm"]
    return {name: named(name)(stream) for name, stream in x.items()}
