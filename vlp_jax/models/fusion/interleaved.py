"""One stack of text layers that plays three roles (BLIP's MED).

Without an image it encodes text; with one, each layer attends to the image between its
self-attention and its MLP; read from the left it writes text. All roles share all but
the self-attention of the one that writes. BLIP, section 3.1 of
https://arxiv.org/abs/2201.12086, official models/med.py, and models/blip_pretrain.py
`tie_encoder_decoder_weights`.

Shape letters: B batch, L text length, S image tokens, D width.
"""

import flax.linen as nn
import jax.numpy as jnp

from vlp_jax.models import tokens as tokens_lib
from vlp_jax.nn import attention as attention_lib
from vlp_jax.nn import axes
from vlp_jax.nn import block
from vlp_jax.ops import mask as mask_lib

# Which self-attention a layer uses: that of the encoders, or the writer's own.
SELF = {"bidirectional": "attn", "causal": "attn_causal"}


class Layer(nn.Module):
  """A block that has a self-attention for each direction of reading.

  Fields and call are those of `block.Block`, but for the mask, a dict of one entry
  whose key names the direction.

  Attributes:
    reads: directions that there are parameters for. image_width: D'.
  """

  num_heads: int
  mlp_dim: int
  reads: tuple[str, ...]
  image_width: int
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
    ((direction, mask),) = mask.items()

    def branch(x, norm, layer):
      return block.residual(self, x, norm, layer, drop_path=own.drop_path, train=train)

    def attend(name, memory, mask):
      return block.attention(self, name, memory, mask, train=train)

    name = SELF[direction]
    y = branch(x, f"norm_{name}", attend(name, None, mask))
    if self.is_initializing():
      # The roles that this call does not play get their parameters too.
      for other in self.reads:
        if other != direction:
          branch(x, f"norm_{SELF[other]}", attend(SELF[other], None, None))
      if memory is None:
        memory = jnp.zeros((x.shape[0], 1, self.image_width), x.dtype)
    x = y
    memory = memory if own.memory is None else own.memory
    if memory is not None:
      seen = block.mask_of_memory(memory_mask, mask)
      x = branch(x, "norm_cross", attend("cross", memory, seen))
    x = branch(x, "norm_mlp", block.mlp(self, "mlp"))
    return axes.constrain(x, "batch", "length", "act_embed"), None


class Fusion(nn.Module):
  """Embedded words [B, L, D] and image Tokens [B, S, D'] -> Tokens [B, L, D].

  Its layers are the text encoder's as well: `model.text` has depth 0 beside it.

  Attributes:
    depth, num_heads, mlp_dim: sizes of the stack; its width is the text's.
    image_width: D', handed in by `build`.
    reads: directions of reading that it has a self-attention for. BLIP's captioner has
      only the one that writes, its retrieval model only the other.
    norm: "post" (BERT) or "pre", which adds a norm at the end.
  """

  depth: int
  num_heads: int
  mlp_dim: int
  image_width: int
  reads: tuple[str, ...] = ("bidirectional", "causal")
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

  # The text is encoded by these layers too, and comes as embedded words.
  encodes_text = True
  encodes_image = False

  def widths(self, text_width: int) -> tuple[int, int]:
    """(of the fused tokens, of the first of them, which stands for the pair)."""
    return text_width, text_width

  def setup(self):
    unknown = set(self.reads) - set(SELF)
    if unknown or not self.reads:
      raise ValueError(
        f"model.fusion.reads={self.reads}: want some of {', '.join(map(repr, SELF))}."
      )
    self.blocks = block.stack(self, Layer)
    self.last_norm = block.last_norm(self)

  def remember(self, image: tokens_lib.Tokens) -> tokens_lib.Tokens:
    """With the keys and values that all layers ask for: to be fused several times."""
    return image.replace(keys=block.remember(self, image.x))

  def __call__(
    self,
    image: tokens_lib.Tokens | None,
    text: tokens_lib.Tokens,
    *,
    attention: mask_lib.Attention | mask_lib.Writing = "bidirectional",
    train: bool = False,
  ) -> tokens_lib.Tokens:
    """`image` None: the text alone."""
    writing = isinstance(attention, mask_lib.Writing)
    direction = "causal" if writing else attention
    if not isinstance(direction, str) or direction not in self.reads:
      raise ValueError(
        f'attention="{direction}" is wanted of the interleaved stack, but'
        f" model.fusion.reads={self.reads}: add it there."
      )
    seen = attention if writing else mask_lib.attention(text.mask, attention)
    memory = patches = keys = None
    if image is not None:
      memory, keys = image.x, image.keys
      patches = mask_lib.attention(image.mask, "bidirectional")
    mask = {direction: seen}
    x = block.run(self, text.x, mask, memory, patches, keys=keys, train=train)
    return tokens_lib.Tokens(self.last_norm(x), text.mask)
