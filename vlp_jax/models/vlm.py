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
    decoder: text encoder that is read as a decoder: causal, every layer attends to what
      it is given; for objectives that write text (VQA). None: there is none.
    codebook: what makes discrete codes of images, one of `models/codebooks/`; never
      trained. None: there is none.
    embed_dim: E, of the shared contrastive space; None: there is none, and no
      temperature.
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
  decoder: Any = None
  codebook: Any = None
  embed_dim: int | None = 256
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
    if self.embed_dim is None:
      return

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

  def encode_image(
    self,
    image: jax.Array,
    size: jax.Array | None = None,
    hidden: jax.Array | None = None,
    *,
    whole: bool = True,
    train: bool = False,
  ) -> tokens_lib.Tokens:
    """uint8 [B, R, R, 3], normalised here, or float of normalised values.

    size int32 [B, 2], rows and columns of each image where the rest of the canvas is
    padding; for encoders that take it (`models/patches.py`).
    hidden bool [B, P], patches that the encoder replaces by its mask token.
    whole: all tokens are wanted; else what `embed_image` reads of them is enough, and
      an encoder that can makes no more.
    """
    if image.dtype == jnp.uint8:
      image = (image.astype(jnp.float32) / 255.0 - jnp.asarray(self.image_mean)) / (
        jnp.asarray(self.image_std)
      )
    fused = self.fusion is not None and self.fusion.encodes_image
    more = _asked(self.image, whole or fused)
    if hidden is not None:
      tokens = self.image(image, hidden=hidden, train=train, **more)
    elif size is None:
      tokens = self.image(image, train=train, **more)
    else:
      tokens = self.image(image, size, train=train, **more)
    if not fused:
      return tokens
    # As `fuse` takes them, the tokens are kept as `raw`.
    return self.fusion(tokens, None, train=train)

  def image_codes(self, image: jax.Array) -> jax.Array:
    """int32 [B, P] of images as `encode_image` takes them; has no gradient."""
    if self.codebook is None:
      raise ValueError(
        "this objective wants codes of images, but model.codebook is not set: say e.g."
        ' model.codebook=dict(type="dvae"), or take them from a column of the data,'
        ' targets="column".'
      )
    if image.dtype == jnp.uint8:
      image = image.astype(jnp.float32) / 255.0
    else:
      image = image * jnp.asarray(self.image_std) + jnp.asarray(self.image_mean)
    return jax.lax.stop_gradient(self.codebook(image))

  def encode_text(
    self,
    ids: jax.Array,
    mask: jax.Array,
    *,
    attention: mask_lib.Attention | None = None,
    whole: bool = True,
    train: bool = False,
  ) -> tokens_lib.Tokens:
    """ids int32 [B, L], mask bool [B, L], false at padding.

    attention: None: the text encoder's own; of a fusion that encodes the text too,
      "bidirectional" unless it reads in no such way (a captioner's).
    whole: as of `encode_image`.
    """
    fused = self.fusion is not None and self.fusion.encodes_text
    more = _asked(self.text, whole or fused)
    tokens = self.text(ids, mask, attention=attention, train=train, **more)
    if not fused:
      return tokens
    reads = self.fusion.reads
    own = reads[0] if reads and "bidirectional" not in reads else "bidirectional"
    return self.fusion(None, tokens, attention=attention or own, train=train)

  def words(
    self,
    ids: jax.Array,
    mask: jax.Array,
    encoded: tokens_lib.Tokens | None = None,
    attention: mask_lib.Attention | mask_lib.Writing | None = None,
    *,
    train: bool = False,
  ) -> tokens_lib.Tokens:
    """The text Tokens that `fuse` takes.

    They are the encoded text, or embedded words where the fusion's layers encode the
    text as well. There the first id tells the layers what they are for, where the
    vocabulary has such ids: BLIP's [ENC] to read with the image, [DEC] to write.

    Args:
      ids, mask: int32 and bool [B, L].
      encoded: what `encode_text` made of them with the encoder's own attention; where
        that is wanted, it is not made again.
      attention: as of `encode_text`.
      train: drops out.
    """
    if self.fusion is not None and self.fusion.encodes_text:
      vocab, writing = self.text.vocab, isinstance(attention, mask_lib.Writing)
      first = vocab.dec if writing or attention == "causal" else vocab.enc
      if first is not None:
        ids = mask_lib.begin(ids, first, attention)
      return self.text(ids, mask, attention=attention if writing else None, train=train)
    if encoded is not None and (
      attention is None
      or (isinstance(attention, str) and attention == self.text.attention)
    ):
      return encoded
    return self.encode_text(ids, mask, attention=attention, train=train)

  def embed_image(self, tokens: tokens_lib.Tokens) -> jax.Array | None:
    """float32 [B, E] of unit norm; None where there is no contrastive space."""
    if self.embed_dim is None:
      return None
    return contrastive.normalize(self.image_project(self.image.pooled(tokens)))

  def embed_text(self, tokens: tokens_lib.Tokens) -> jax.Array | None:
    """float32 [B, E] of unit norm; None where there is no contrastive space."""
    if self.embed_dim is None:
      return None
    return contrastive.normalize(self.text_project(self.text.pooled(tokens)))

  def inverse_temperature(self) -> jax.Array:
    """float32 []: what similarities are multiplied by."""
    if self.embed_dim is None:
      raise ValueError(
        "this objective contrasts image and text, but model.embed_dim=None: say the"
        " width of the space, e.g. 256."
      )
    if self.scale == "log_scale":
      return jnp.exp(self.scale_param)
    return 1.0 / self.scale_param

  def fuse(
    self,
    image: Any,
    text: tokens_lib.Tokens,
    *,
    attention: mask_lib.Attention | mask_lib.Writing = "bidirectional",
    image_type: int | None = None,
    train: bool = False,
  ) -> tokens_lib.Tokens | tokens_lib.Fused:
    """Tokens of text that has seen the image (Tokens, or what the fusion takes).

    image_type: which of several images this is (1, 2), for fusions that tell them apart
      by a type embedding.
    """
    if self.fusion is None:
      raise ValueError(
        "this objective fuses image and text, but model.fusion is not set:"
        ' say e.g. model.fusion=dict(type="cross_attention", depth=6).'
      )
    which = {} if image_type is None else {"image_type": image_type}
    return self.fusion(image, text, attention=attention, train=train, **which)

  def remember(self, image: tokens_lib.Tokens) -> tokens_lib.Tokens:
    """The image for `fuse`, several times: with what its layers can share, if they do.

    Such images may be fused with T times as many texts, text i with image i // T.
    """
    if not hasattr(self.fusion, "remember"):
      return image
    return self.fusion.remember(image)

  def pool_pair(self, fused: tokens_lib.Tokens | tokens_lib.Fused) -> jax.Array:
    """[B, C]: one vector of each fused pair, the fusion's or its first token."""
    return fused.pooled if isinstance(fused, tokens_lib.Fused) else fused.x[:, 0]

  def fused_image(
    self, fused: tokens_lib.Tokens | tokens_lib.Fused
  ) -> tokens_lib.Tokens:
    """Tokens of the image that have seen the text, where the fusion makes them."""
    if not isinstance(fused, tokens_lib.Fused):
      raise ValueError(
        "this objective wants image tokens that have seen the text, which this"
        ' model.fusion does not make: use type="merged" or "co_attention".'
      )
    return fused.image

  def decode(
    self,
    ids: jax.Array,
    mask: jax.Array,
    memory: tokens_lib.Tokens,
    *,
    attention: mask_lib.Attention | mask_lib.Writing = "causal",
    train: bool = False,
  ) -> tokens_lib.Tokens:
    """Tokens [B, T, D] of ids int32 [B, T] read from the left, each given `memory`.

    The first id is the vocabulary's `dec`, where it has one.
    """
    if self.decoder is None:
      raise ValueError(
        "this objective writes text, but model.decoder is not set: say e.g."
        ' model.decoder=dict(type="text", depth=6).'
      )
    if self.decoder.vocab.dec is not None:
      ids = mask_lib.begin(ids, self.decoder.vocab.dec, attention)
    return self.decoder(ids, mask, attention=attention, memory=memory, train=train)

  def decoded_logits(self, x: jax.Array) -> jax.Array:
    """[..., D] -> float32 [..., V], tied to the decoder's word table."""
    return self.decoder.word_logits(x)

  def word_logits(self, x: jax.Array) -> jax.Array:
    """[..., D] -> float32 [..., V], tied to the text encoder's word table."""
    return self.text.word_logits(x)


def _asked(encoder: nn.Module, whole: bool) -> dict[str, bool]:
  """What an encoder is told of the tokens that are wanted; most make all of them."""
  return {} if whole or not getattr(encoder, "picks", False) else {"whole": False}
