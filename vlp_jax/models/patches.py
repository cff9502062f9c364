"""Images as linear patches and nothing more, for a fusion that does the rest (ViLT).

Kim et al. 2021, section 3.1 of https://arxiv.org/abs/2102.03334; official
vilt/modules/vision_transformer.py `visual_embed`. Images of several sizes lie in the
upper left corner of a canvas, and each has its own grid of positions.

Shape letters: B batch, R side of the canvas, P patches of it, K kept ones, D width,
G grid of the position table.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.models import tokens as tokens_lib
from vlp_jax.models import vit
from vlp_jax.nn import axes
from vlp_jax.nn import dropout as dropout_lib
from vlp_jax.nn import linear
from vlp_jax.ops import posembed


class Encoder(nn.Module):
  """Image [B, R, R, 3] -> Tokens of [B, 1 + K, D]: a class token, then patches.

  Attributes:
    width: D, that of the fusion's stack.
    patch: side of a patch. res: R, side of the canvas that a batch has.
    table_res: side of the images that the position table is for (official: 384); None:
      as `res`. An image gets it stretched to its own grid, bilinear.
    max_patches: K; of an image that has more, so many are drawn in training (official
      max_image_len), and the first so many taken otherwise. None: all of the canvas.
  """

  width: int
  patch: int
  res: int
  table_res: int | None = None
  max_patches: int | None = None
  dropout: float = 0.0
  init_std: float | None = 0.02
  dtype: str = "float32"

  def setup(self):
    table_res = self.table_res or self.res
    for name, side in (("res", self.res), ("table_res", table_res)):
      if side % self.patch:
        raise ValueError(
          f"model.image: {name}={side} is not a multiple of patch={self.patch}."
        )
    self.project = linear.Linear(
      "BPK,KD->BPD",
      (self.patch**2 * 3, self.width),
      ("patch", "embed"),
      init_std=self.init_std,
      dtype=self.dtype,
      name="patch",
    )
    small = axes.kernel_init(0.02, self.width)
    self.cls = self.param("cls", axes.boxed(small, "embed"), (self.width,))
    rows = 1 + (table_res // self.patch) ** 2
    table = axes.boxed(small, "pos", "embed")
    self.table = self.param("posemb", table, (rows, self.width))
    self.drop = dropout_lib.Dropout(self.dropout)

  def __call__(
    self, image: jax.Array, size: jax.Array | None = None, *, train: bool = False
  ) -> tokens_lib.Tokens:
    """image float [B, R, R', 3], normalised; size int32 [B, 2] of each, None: full.

    What lies outside of an image's size is neither read nor attended to.
    """
    if size is None:
      full = jnp.asarray(image.shape[1:3], jnp.int32)
      size = jnp.broadcast_to(full, (image.shape[0], 2))
    at, real = self._choose(image.shape[1:3], size, train)
    # The official code pads images that are normalised already: with zeros.
    inside = [
      jnp.arange(side)[None, :] < size[:, axis, None]
      for axis, side in enumerate(image.shape[1:3])
    ]
    inside = inside[0][:, :, None] & inside[1][:, None, :]
    image = jnp.where(inside[..., None], image, 0.0)
    pixels = vit.patchify(image, self.patch)
    x = self.project(jnp.take_along_axis(pixels, at[..., None], axis=1))
    columns = image.shape[2] // self.patch
    grid = -(-size // self.patch)
    stretched = posembed.bilinear(self.table[1:], at // columns, at % columns, grid)
    x = x + jnp.where(real[..., None], stretched, 0.0).astype(x.dtype)
    cls = (self.cls + self.table[0]).astype(x.dtype)
    cls = jnp.broadcast_to(cls, (x.shape[0], 1, self.width))
    x = self.drop(jnp.concatenate([cls, x], axis=1), deterministic=not train)
    x = axes.constrain(x, "batch", "length", "act_embed")
    return tokens_lib.Tokens(x, jnp.pad(real, ((0, 0), (1, 0)), constant_values=True))

  def _choose(self, canvas, size, train):
    """(int32 [B, K] places on the canvas, bool [B, K] whether they are of the image).

    The image's patches come first, by rows.
    """
    rows, columns = (side // self.patch for side in canvas)
    grid = -(-size // self.patch)
    place = jnp.arange(rows * columns)
    real = (place // columns < grid[:, :1]) & (place % columns < grid[:, 1:])
    order = jnp.where(real, 0, rows * columns) + place
    kept = min(self.max_patches or rows * columns, rows * columns)
    if train and kept < rows * columns:
      drawn = jax.random.uniform(self.make_rng("sample"), real.shape)
      crowded = real.sum(axis=1, keepdims=True) > kept
      order = jnp.where(real & crowded, drawn, order)
    at = jnp.argsort(order, axis=1, stable=True)[:, :kept]
    return at, jnp.take_along_axis(real, at, axis=1)
