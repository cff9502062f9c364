"""Late fusion: what two encoders say of a pair, joined in one small network.

The image and the text meet only as one vector each: nothing of the image reaches the
words. The baseline that everything else is measured against (VisualBERT's and ViLT's
figure 2 a, b).

Shape letters: B batch, L text length, S image tokens, D width, P of the joined pair.
"""

import flax.linen as nn
import jax.numpy as jnp

from vlp_jax.models import tokens as tokens_lib
from vlp_jax.nn import block
from vlp_jax.nn import dropout as dropout_lib
from vlp_jax.nn import linear
from vlp_jax.nn import pool as pool_lib
from vlp_jax.ops import mask as mask_lib


class Fusion(nn.Module):
  """Text Tokens [B, L, D], image Tokens [B, S, D'] -> Fused, the tokens as they were.

  `pooled` [B, P] is a layer on both pooled vectors, concatenated. Without it a linear
  classifier could tell how likely an image and a text are, but not whether they fit.

  Attributes:
    text_width, image_width: D, D', handed in by `build`.
    width: P; None: as the text.
    pool: how each sequence becomes one vector.
  """

  text_width: int
  image_width: int
  width: int | None = None
  pool: pool_lib.Kind = "first"
  act: block.Activation = "gelu"
  dropout: float = 0.0
  init_std: float | None = 0.02
  dtype: str = "float32"

  # The text comes encoded.
  encodes_text = False
  encodes_image = False

  def widths(self, text_width: int) -> tuple[int, int]:
    """(of the text's tokens, of the joined pair), for a text of this width."""
    return text_width, self.width or text_width

  def setup(self):
    if self.pool == "map":
      raise ValueError(
        'model.fusion.pool="map" has parameters, which type="concat" does not make: say'
        ' "first", "last" or "mean".'
      )
    self.join = linear.Linear(
      "BD,DE->BE",
      (self.text_width + self.image_width, self.width or self.text_width),
      ("embed", "proj"),
      init_std=self.init_std,
      dtype=self.dtype,
    )
    self.drop = dropout_lib.Dropout(self.dropout)

  def __call__(
    self,
    image: tokens_lib.Tokens,
    text: tokens_lib.Tokens,
    *,
    attention: mask_lib.Attention = "bidirectional",
    train: bool = False,
  ) -> tokens_lib.Fused:
    del attention  # nothing attends
    both = [pool_lib.pool(part.x, part.mask, self.pool) for part in (text, image)]
    joined = block.ACTIVATIONS[self.act](self.join(jnp.concatenate(both, axis=-1)))
    joined = self.drop(joined, deterministic=not train)
    return tokens_lib.Fused(text.x, text.mask, image, joined)
