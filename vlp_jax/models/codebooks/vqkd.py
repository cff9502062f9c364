"""BEiT v2's tokenizer of images (VQ-KD): a code of each patch, for what it shows.

Peng et al. 2022, section 2.2 of https://arxiv.org/abs/2208.06366; microsoft/unilm
beit2/modeling_vqkd.py, norm_ema_quantizer.py. BEiT-3's targets of masked images. What
only its training has, the decoder and the teacher, is left out.

Shape letters: B batch, R side of the image, S side that is read, P patches, D width,
C codes, K width of a code.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.models import vit
from vlp_jax.nn import attention
from vlp_jax.nn import axes
from vlp_jax.nn import linear
from vlp_jax.ops import contrastive


class Codebook(nn.Module):
  """Image [B, R, R, 3] -> codes int32 [B, P], P = (S / patch)².

  Attributes:
    res: S; other images are resized, bicubic.
    patch: side of a patch in pixels.
    width, depth, num_heads, mlp_dim: of the encoder, a ViT.
    codes: C.
    code_width: K.
    backend, unroll, dtype: of the encoder.
  """

  res: int = 224
  patch: int = 16
  width: int = 768
  depth: int = 12
  num_heads: int = 12
  mlp_dim: int = 3072
  codes: int = 8192
  code_width: int = 32
  backend: attention.Backend = "auto"
  unroll: int = 1
  dtype: str = "float32"

  def setup(self):
    if self.res % self.patch:
      raise ValueError(
        f"model.codebook: res={self.res} is not a multiple of patch={self.patch}."
      )
    # modeling_vqkd.py get_model_default_params: no distances, no scales of layers.
    self.encoder = vit.Encoder(
      self.width,
      self.depth,
      self.num_heads,
      self.mlp_dim,
      self.patch,
      self.res,
      norm_eps=1e-6,
      backend=self.backend,
      unroll=self.unroll,
      dtype=self.dtype,
    )
    # In float32, as officially, whatever the encoder computes in.
    width, code = self.width, self.code_width
    self.dense = linear.Linear("BPD,DE->BPE", (width, width), ("embed", "proj"))
    self.out = linear.Linear("BPD,DK->BPK", (width, code), ("embed", None))
    table = axes.boxed(_unit_rows, "vocab", None)
    self.table = self.param("table", table, (self.codes, code))

  def __call__(self, image: jax.Array) -> jax.Array:
    """image float [B, R, R, 3] of 0 … 1."""
    return nearest(self.features(self.small(image)), self.table)

  @property
  def patches(self) -> int:
    return (self.res // self.patch) ** 2

  def small(self, image):
    """[B, S, S, 3] of -1 … 1, as `features` takes it."""
    shape = (len(image), self.res, self.res, 3)
    if image.shape != shape:
      image = jnp.clip(jax.image.resize(image, shape, "cubic"), 0.0, 1.0)
    return 2.0 * image - 1.0

  def features(self, x: jax.Array) -> jax.Array:
    """float32 [B, P, K] of pixels [B, S, S, 3] that `small` has mapped."""
    patches = self.encoder(x).x[:, 1:]  # Without the class token.
    return self.out(jnp.tanh(self.dense(patches)))


def nearest(x: jax.Array, table: jax.Array) -> jax.Array:
  """int32 [B, P]: which row of the table [C, K] is nearest to x [B, P, K] of length 1.

  Equation 1: argmin_j |x_i / |x_i| - e_j|. The rows of published tables have length 1,
  where it is the largest cosine; they are taken as they are, as officially.
  """
  product = jnp.einsum(
    "BPK,CK->BPC",
    contrastive.normalize(x),
    table,
    precision=jax.lax.Precision.HIGHEST,
  )
  # What is left out of the squared distance is the same for all rows.
  close = 2.0 * product - jnp.sum(table**2, axis=-1)
  return jnp.argmax(close, axis=-1).astype(jnp.int32)


def _unit_rows(key, shape, dtype=jnp.float32):
  """norm_ema_quantizer.py EmbeddingEMA, where k-means does not find them."""
  return contrastive.normalize(jax.random.normal(key, shape, dtype))
