"""Text layers that attend to two images at once (BLIP for NLVR2).

Each layer of the interleaved stack has a cross-attention for each image; the lower
layers average what the two find, the upper ones merge it by a linear map. BLIP, section
5.4 of https://arxiv.org/abs/2201.12086, official models/nlvr_encoder.py.

Shape letters: B batch, L text length, S image tokens, D width.
"""

import flax.linen as nn
import jax.numpy as jnp

from vlp_jax.models import tokens as tokens_lib
from vlp_jax.nn import attention as attention_lib
from vlp_jax.nn import axes
from vlp_jax.nn import block
from vlp_jax.nn import linear
from vlp_jax.ops import mask as mask_lib


class Layer(nn.Module):
  """A block with two cross-attentions side by side.

  Fields and call are those of `block.Block`, where memory and its mask are pairs, or
  None for the text alone.

  Attributes:
    merge: a linear map makes one of what the two find, else it is averaged.
    image_width: D'.
  """

  num_heads: int
  mlp_dim: int
  image_width: int
  merge: bool = False
  norm: block.Norm = "post"
  norm_eps: float = 1e-12
  act: block.Activation = "gelu"
  dropout: float = 0.0
  dropout_attention: float = 0.0
  backend: attention_lib.Backend = "auto"
  init_std: float | None = 0.02
  dtype: str = "float32"
  bias: bool = True

  @nn.compact
  def __call__(self, x, own, mask, memory, memory_mask, train):
    def branch(x, norm, layer):
      return block.residual(self, x, norm, layer, drop_path=own.drop_path, train=train)

    def look(y):
      seen = memory_mask or (None, None)
      first, second = (
        block.attention(self, f"cross_{i}", memory[i], seen[i], train=train)(y)
        for i in range(2)
      )
      if not self.merge:
        return (first + second) / 2
      width = y.shape[-1]
      return linear.Linear(
        "BLD,DE->BLE",
        (2 * width, width),
        ("proj", "embed"),
        init_std=self.init_std,
        dtype=self.dtype,
        name="merge",
      )(jnp.concatenate([first, second], axis=-1))

    if self.is_initializing() and memory is None:
      # The text alone needs no image, but the parameters are made now.
      memory = 2 * (jnp.zeros((x.shape[0], 1, self.image_width), x.dtype),)
    attend = block.attention(self, "attn", None, mask, train=train)
    x = branch(x, "norm_attn", attend)
    if memory is not None:
      x = branch(x, "norm_cross", look)
    x = branch(x, "norm_mlp", block.mlp(self, "mlp"))
    return axes.constrain(x, "batch", "length", "act_embed"), None


class Stack(nn.Module):
  """Layers of one kind; fields as of `Fusion`."""

  depth: int
  num_heads: int
  mlp_dim: int
  image_width: int
  merge: bool
  norm: block.Norm
  norm_eps: float
  act: block.Activation
  dropout: float
  dropout_attention: float
  backend: attention_lib.Backend
  init_std: float | None
  remat: block.Remat
  unroll: int
  dtype: str

  # `block.stack` reads it.
  drop_path = 0.0

  def setup(self):
    self.blocks = block.stack(self, Layer)

  def __call__(self, x, mask, memory, memory_mask, *, train):
    return block.run(self, x, mask, memory, memory_mask, train=train)


class Fusion(nn.Module):
  """Embedded words [B, L, D] and two images' Tokens [B, S, D'] -> Tokens [B, L, D].

  Its layers are the text encoder's as well: `model.text` has depth 0 beside it.

  Attributes:
    depth, num_heads, mlp_dim: sizes of the stack; its width is the text's.
    image_width: D', handed in by `build`.
    merge_from: the first layer that merges by a linear map (officially 6).
  """

  depth: int
  num_heads: int
  mlp_dim: int
  image_width: int
  merge_from: int = 6
  norm: block.Norm = "post"
  norm_eps: float = 1e-12
  act: block.Activation = "gelu"
  dropout: float = 0.0
  dropout_attention: float = 0.0
  backend: attention_lib.Backend = "auto"
  init_std: float | None = 0.02
  remat: block.Remat = "none"
  unroll: int = 1
  dtype: str = "float32"

  # The text is encoded by these layers too, and comes as embedded words.
  encodes_text = True
  encodes_image = False
  reads = ("bidirectional",)

  def widths(self, text_width: int) -> tuple[int, int]:
    """(of the fused tokens, of the first of them, which stands for the pair)."""
    return text_width, text_width

  def setup(self):
    if not 0 < self.merge_from < self.depth:
      raise ValueError(
        f"model.fusion: merge_from={self.merge_from} with depth={self.depth}: want 1 to"
        f" {self.depth - 1}."
      )
    fields = block.common_fields(self, Stack)
    lower, upper = self.merge_from, self.depth - self.merge_from
    self.lower = Stack(**(fields | dict(depth=lower, merge=False)))
    self.upper = Stack(**(fields | dict(depth=upper, merge=True)))
    self.last_norm = block.last_norm(self)

  def __call__(
    self,
    image: tuple[tokens_lib.Tokens, tokens_lib.Tokens] | None,
    text: tokens_lib.Tokens,
    *,
    attention: mask_lib.Attention = "bidirectional",
    train: bool = False,
  ) -> tokens_lib.Tokens:
    """`image` None: the text alone."""
    if image is not None and (not isinstance(image, tuple) or len(image) != 2):
      raise ValueError(
        'model.fusion.type="twin" fuses two images with a text: use it with an'
        " objective of two images, objectives.classify.images=2."
      )
    seen = mask_lib.attention(text.mask, attention)
    memory = patches = None
    if image is not None:
      memory = tuple(one.x for one in image)
      patches = tuple(mask_lib.attention(one.mask, "bidirectional") for one in image)
    x = text.x
    for stack in (self.lower, self.upper):
      x = stack(x, seen, memory, patches, train=train)
    return tokens_lib.Tokens(self.last_norm(x), text.mask)
