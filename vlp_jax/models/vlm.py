"""An image encoder, a text encoder and a way of fusing them, in one model.

What two objectives need lives here: projections, temperature, word logits. What one
objective needs lives in that objective.

Shape letters: B batch, R side of the image, L text length, D width, E embedding.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.models import tokens as tokens_lib
from vlp_jax.nn import attention as attention_lib
from vlp_jax.nn import axes
from vlp_jax.nn import block
from vlp_jax.nn import linear
from vlp_jax.ops import contrastive
from vlp_jax.ops import mask as mask_lib

# Of OpenAI's CLIP, which ALBEF and BLIP use too.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class VLM(nn.Module):
  """A vision-language model.

  Attributes:
    image: encoder of images; type "vit" is `models/vit.py`.
    text: encoder of text; type "text" is `models/text.py`.
    fusion: stack that joins them, one of `models/fusion/`; None for a dual encoder.
    embed_dim: E, of the shared contrastive space.
    scale: the parameter behind the temperature: "temp" is the temperature itself
      (ALBEF), "log_scale" the logarithm of its inverse (CLIP). `optim.bounds` clamps.
    temperature: its first value.
    project: towers whose pooled vector has a linear map into the space; the others are
      of its width. project_bias: whether the maps have a bias.
    image_mean, image_std: of uint8 images divided by 255, per channel.
    backend, dtype, remat, unroll: of the towers that do not name their own (`build`).
  """

  image: Any
  text: Any
  fusion: Any = None
  embed_dim: int = 256
  scale: Literal["temp", "log_scale"] = "temp"
  temperature: float = 0.07
  project: tuple[Literal["image", "text"], ...] = ("image", "text")
  project_bias: bool = True
  image_mean: tuple[float, ...] = CLIP_MEAN
  image_std: tuple[float, ...] = CLIP_STD
  backend: attention_lib.Backend = "auto"
  remat: block.Remat = "none"
  unroll: int = 1
  dtype: str = "float32"

  def setup(self):
    def project(width, tower):
      if tower not in self.project:
        if width != self.embed_dim:
          raise ValueError(
            f"model.{tower} of width {width} has no projection to"
            f" model.embed_dim={self.embed_dim}: make them equal, or name it in"
            f" model.project, which is {tuple(self.project)}."
          )
        return lambda x: x
      return linear.Linear(
        "BD,DE->BE",
        (width, self.embed_dim),
        ("embed", "proj"),
        bias=self.project_bias,
        init_std=None,
        name=f"{tower}_proj",
      )

    self.image_project = project(self.image.width, "image")
    self.text_project = project(self.text.width, "text")
    first = self.temperature
    if self.scale == "log_scale":
      first = -jnp.log(first)
    init = axes.boxed(nn.initializers.constant(first))
    self.scale_param = self.param(self.scale, init, ())

  def encode_image(self, image: jax.Array, *, train: bool = False) -> tokens_lib.Tokens:
    """uint8 [B, R, R, 3], normalised here, or float of normalised values."""
    if image.dtype == jnp.uint8:
      image = (image.astype(jnp.float32) / 255.0 - jnp.asarray(self.image_mean)) / (
        jnp.asarray(self.image_std)
      )
    return self.image(image, train=train)

  def encode_text(
    self,
    ids: jax.Array,
    mask: jax.Array,
    *,
    attention: mask_lib.Attention | None = None,
    train: bool = False,
  ) -> tokens_lib.Tokens:
    """ids int32 [B, L], mask bool [B, L], false at padding."""
    return self.text(ids, mask, attention=attention, train=train)

  def embed_image(self, tokens: tokens_lib.Tokens) -> jax.Array:
    """float32 [B, E] of unit norm."""
    return contrastive.normalize(self.image_project(self.image.pooled(tokens)))

  def embed_text(self, tokens: tokens_lib.Tokens) -> jax.Array:
    """float32 [B, E] of unit norm."""
    return contrastive.normalize(self.text_project(self.text.pooled(tokens)))

  def inverse_temperature(self) -> jax.Array:
    """float32 []: what similarities are multiplied by."""
    if self.scale == "log_scale":
      return jnp.exp(self.scale_param)
    return 1.0 / self.scale_param

  def fuse(
    self,
    image: tokens_lib.Tokens,
    text: tokens_lib.Tokens,
    *,
    attention: mask_lib.Attention = "bidirectional",
    train: bool = False,
  ) -> tokens_lib.Tokens:
    """Tokens of text that has seen the image: [B, L, D]."""
    if self.fusion is None:
      raise ValueError(
        "this objective fuses image and text, but model.fusion is not set:"
        ' say e.g. model.fusion=dict(type="cross_attention", depth=6).'
      )
    return self.fusion(image, text, attention=attention, train=train)

  def word_logits(self, x: jax.Array) -> jax.Array:
    """[..., D] -> float32 [..., V], tied to the text encoder's word table."""
    return self.text.word_logits(x)
