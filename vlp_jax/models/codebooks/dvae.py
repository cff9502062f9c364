"""The encoder of DALL-E's discrete VAE: codes of 8 x 8 pixels.

Ramesh et al. 2021, appendix A of https://arxiv.org/abs/2102.12092; openai/DALL-E
dall_e/encoder.py; transformers modeling_flava.py FlavaImageCodebook. BEiT's and FLAVA's
targets of masked images.

Shape letters: B batch, R side of the image, S side of its small copy, P patches,
H hidden width, C codes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.nn import conv

# openai/DALL-E dall_e/utils.py map_pixels: keeps values off the ends of 0 … 1.
EPS = 0.1
GROUPS = 4  # each halves the sides, but for the last


class Codebook(nn.Module):
  """Image [B, R, R, 3] -> codes int32 [B, P], P = (S / 8)².

  Attributes:
    res: S; other images are resized (FLAVA: 112 pixels of 224, by Lanczos).
    hidden: H, a multiple of 4; the last group is 8 H wide.
    blocks: of each group.
    codes: C.
  """

  res: int = 112
  hidden: int = 256
  blocks: int = 2
  codes: int = 8192
  dtype: str = "float32"

  @nn.compact
  def __call__(self, image: jax.Array) -> jax.Array:
    """image float [B, R, R, 3] of 0 … 1."""
    return jnp.argmax(self.logits(self.small(image)), axis=-1).astype(jnp.int32)

  @property
  def patches(self) -> int:
    return (self.res // 2 ** (GROUPS - 1)) ** 2

  def small(self, image):
    """[B, S, S, 3], as `logits` takes it."""
    shape = (len(image), self.res, self.res, 3)
    if image.shape != shape:
      image = jnp.clip(jax.image.resize(image, shape, "lanczos3"), 0.0, 1.0)
    return (1.0 - 2.0 * EPS) * image + EPS

  @nn.compact
  def logits(self, x: jax.Array) -> jax.Array:
    """float32 [B, P, C] of pixels [B, S, S, 3] that `small` has mapped."""
    if self.res % 2 ** (GROUPS - 1) or self.hidden % 4:
      raise ValueError(
        f"model.codebook: res={self.res} wants a multiple of {2 ** (GROUPS - 1)},"
        f" hidden={self.hidden} one of 4."
      )
    x = conv.Conv(self.hidden, 7, self.dtype, name="input")(x)
    gain = 1.0 / (GROUPS * self.blocks) ** 2
    for group in range(GROUPS):
      for number in range(self.blocks):
        name, width = f"group_{group + 1}_block_{number + 1}", self.hidden << group
        x = Block(width, gain, self.dtype, name=name)(x)
      if group + 1 < GROUPS:
        x = nn.max_pool(x, (2, 2), (2, 2))
    # The last map in float32, as officially: a code is the largest of thousands.
    x = jax.nn.relu(x).astype(jnp.float32)
    logits = conv.Conv(self.codes, name="output")(x)
    return logits.reshape(len(x), self.patches, self.codes)


class Block(nn.Module):
  """x and a bottleneck of four convolutions on it, [B, R, C, I] -> [B, R, C, O].

  Attributes:
    width: O. gain: of the bottleneck.
  """

  width: int
  gain: float
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y, narrow = x, self.width // 4
    for i, (width, size) in enumerate([(narrow, 3)] * 3 + [(self.width, 1)]):
      layer = conv.Conv(width, size, self.dtype, name=f"conv_{i + 1}")
      y = layer(jax.nn.relu(y))
    if x.shape[-1] != self.width:
      x = conv.Conv(self.width, 1, self.dtype, name="id")(x)
    return x + self.gain * y
