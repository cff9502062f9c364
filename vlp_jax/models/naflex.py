"""A Vision Transformer of images that keep their aspect ratio (NaFlex of SigLIP 2).

Tschannen et al. 2025, section 2.4.2 of https://arxiv.org/abs/2502.14786; transformers
models/siglip2/modeling_siglip2.py. An image is a row of at most so many patches, and
has its own grid; shapes are static all the same: rows are padded, and the table of
positions is resampled for each image by matrices that depend on its grid.

Shape letters: B batch, R side of the canvas, P patches, K pixels of a patch, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.models import tokens as tokens_lib
from vlp_jax.models import vit
from vlp_jax.nn import attention as attention_lib
from vlp_jax.nn import axes
from vlp_jax.nn import block
from vlp_jax.nn import dropout as dropout_lib
from vlp_jax.nn import linear
from vlp_jax.nn import pool as pool_lib
from vlp_jax.ops import posembed


class Encoder(nn.Module):
  """Rows of patches and their grids -> Tokens of [B, P, D], masked.

  Attributes:
    width, depth, num_heads, mlp_dim: sizes of the stack.
    patch: side of a patch in pixels. res: R; a row has (R / patch)² patches,
      and the table as many positions.
    pool: how `pooled` makes one vector of the patches: "map" or "mean".
  """

  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  patch: int
  res: int
  pool: pool_lib.Kind = "map"
  norm: block.Norm = "pre"
  norm_eps: float = 1e-6
  act: block.Activation = "gelu_tanh"
  dropout: float = 0.0
  dropout_attention: float = 0.0
  drop_path: float = 0.0
  backend: attention_lib.Backend = "auto"
  init_std: float | None = 0.02
  remat: block.Remat = "none"
  unroll: int = 1
  dtype: str = "float32"

  def setup(self):
    if self.res % self.patch:
      raise ValueError(
        f"model.image: res={self.res} is not a multiple of patch={self.patch}."
      )
    if self.pool not in ("map", "mean") or self.norm != "pre":
      raise ValueError(
        f"model.image: type='naflex' has no class token and a norm at the end: pool="
        f"{self.pool!r}, norm={self.norm!r}; want 'map' or 'mean', and 'pre'."
      )
    self.patch_embed = linear.Linear(
      "BPK,KD->BPD",
      (self.patch**2 * 3, self.width),
      ("patch", "embed"),
      init_std=self.init_std,
      dtype=self.dtype,
      name="patch",
    )
    table = axes.boxed(axes.kernel_init(0.02, self.width), "pos", "embed")
    rows = (self.res // self.patch) ** 2
    self.table = self.param("posemb", table, (rows, self.width))
    self.drop = dropout_lib.Dropout(self.dropout)
    self.blocks = block.stack(self)
    self.last_norm = linear.LayerNorm(self.norm_eps, self.dtype, name="norm")
    if self.pool == "map":
      self.pooler = pool_lib.MapPool(
        self.num_heads,
        self.mlp_dim,
        self.norm_eps,
        self.dtype,
        self.act,
        name="map_pool",
      )

  def __call__(
    self, image: jax.Array, grid: jax.Array | None = None, *, train: bool = False
  ) -> tokens_lib.Tokens:
    """Encodes rows of patches.

    Args:
      image: float [B, R, R, 3], normalised: the row of patches, cut into the lines of a
        square canvas (`naflex` of data/ops_image.py). Or the rows themselves,
        [B, P, K], of any P.
      grid: int32 [B, 2], lines and columns of each image's grid in patches; what is
        behind lines * columns is padding. None: the canvas is one square image.
      train: drops out.
    """
    pixels = image if image.ndim == 3 else vit.patchify(image, self.patch)
    if grid is None:
      if image.ndim == 3:
        raise ValueError("rows of patches want the size of each image's grid.")
      sides = jnp.asarray([side // self.patch for side in image.shape[1:3]], jnp.int32)
      grid = jnp.broadcast_to(sides, (image.shape[0], 2))
    at = jnp.broadcast_to(jnp.arange(pixels.shape[1]), pixels.shape[:2])
    mask = at < jnp.prod(grid, axis=1, keepdims=True)
    columns = grid[:, 1:]
    positions = posembed.antialiased(self.table, at // columns, at % columns, grid)
    x = self.patch_embed(pixels)
    x = x + jnp.where(mask[..., None], positions, 0.0).astype(x.dtype)
    x = axes.constrain(x, "batch", "length", "act_embed")
    x = self.drop(x, deterministic=not train)
    x = block.run(self, x, mask[:, None, None, :], train=train)
    return tokens_lib.Tokens(self.last_norm(x), mask)

  def pooled(self, tokens: tokens_lib.Tokens) -> jax.Array:
    """[B, P, D] -> [B, D], of the patches that are no padding."""
    if self.pool == "map":
      return self.pooler(tokens.x, tokens.mask)
    return pool_lib.pool(tokens.x, tokens.mask, self.pool)
