"""Vision Transformer (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929).

Shape letters: B batch, P patches, K pixels of a patch, D width, L = P (+ 1).
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.models import tokens as tokens_lib
from vlp_jax.nn import attention as attention_lib
from vlp_jax.nn import axes
from vlp_jax.nn import block
from vlp_jax.nn import dropout as dropout_lib
from vlp_jax.nn import linear
from vlp_jax.nn import pool as pool_lib
from vlp_jax.nn import stem as stem_lib
from vlp_jax.ops import posembed


class Encoder(nn.Module):
  """Image [B, R, R, 3] -> Tokens of [B, P (+ 1 or 2), D].

  Attributes:
    width, depth, num_heads, mlp_dim: sizes of the stack. Depth 0 only embeds patches,
      for a fusion whose layers do the rest.
    patch: side of a patch in pixels. res: side of the image that `posemb` is for.
    stem: what makes tokens of pixels: one linear map of each patch, or a few strided
      convolutions (`nn/stem.py`), which learn from fewer images; "conv_deep" has more.
    class_token: prepends a learned token.
    distill_token: and another one behind it (DeiT, https://arxiv.org/abs/2012.12877,
      section 3: there a teacher's prediction is learned from it).
    pool: how `pool` makes one vector of the tokens.
    posemb: learned table, fixed sin-cos of MAE, or none. Images of another size than
      `res` get the learned table resampled, bicubic, as ALBEF does.
    norm_pre: a layer norm before the blocks (CLIP).
    patch_bias: of the patch embedding (CLIP has none).
    queries: attention pooling behind the blocks (CoCa): what the first of so many
      learned queries finds stands for the image, what the others find are its tokens.
      0: none. The last norm comes behind it.
    query_heads: of that attention.
    trunk_width: of the blocks, where the pooling makes another width of it.
    mask_token: has a learned token that stands for a hidden patch.
    drop_patches: share of the patches that are dropped in training, others of each
      image (FLIP, https://arxiv.org/abs/2212.00794); class token and positions stay.
    keep_raw: the Tokens hold those before the last norm too.
  """

  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  patch: int
  res: int
  stem: Literal["patch", "conv", "conv_deep"] = "patch"
  class_token: bool = True
  distill_token: bool = False
  pool: pool_lib.Kind = "first"
  posemb: Literal["learned", "sincos2d", "none"] = "learned"
  norm: block.Norm = "pre"
  norm_eps: float = 1e-6
  norm_pre: bool = False
  patch_bias: bool = True
  queries: int = 0
  query_heads: int = 8
  trunk_width: int | None = None
  mask_token: bool = False
  act: block.Activation = "gelu"
  dropout: float = 0.0
  dropout_attention: float = 0.0
  drop_path: float = 0.0
  drop_patches: float = 0.0
  keep_raw: bool = False
  backend: attention_lib.Backend = "auto"
  init_std: float | None = 0.02
  remat: block.Remat = "none"
  unroll: int = 1
  dtype: str = "float32"

  # It is called with `whole` too.
  picks = True

  def setup(self):
    if self.res % self.patch:
      raise ValueError(
        f"model.image: res={self.res} is not a multiple of patch={self.patch}."
      )
    if self.pool == "first" and not self.class_token:
      raise ValueError('model.image.pool="first" needs model.image.class_token=True.')
    if self.trunk_width and not self.queries:
      raise ValueError(
        f"model.image.trunk_width={self.trunk_width} wants attention pooling, which"
        " makes the width of it: set model.image.queries, e.g. 256."
      )
    trunk = self.trunk_width or self.width
    if self.stem != "patch":
      halvings = len(stem_lib.prime_factors(self.patch)) - 1
      if halvings < 0 or trunk % 2**halvings:
        raise ValueError(
          f"model.image: stem={self.stem!r} of patch={self.patch} halves width={trunk}"
          f" {halvings} times: take a multiple of {2 ** max(halvings, 0)}, and a patch"
          " of 2 or more."
        )
      deep = self.stem == "conv_deep"
      self.conv_stem = stem_lib.ConvStem(
        self.patch, trunk, deep, self.dtype, name="stem"
      )
    else:
      self.patch_embed = linear.Linear(
        "BPK,KD->BPD",
        (self.patch**2 * 3, trunk),
        ("patch", "embed"),
        bias=self.patch_bias,
        init_std=self.init_std,
        dtype=self.dtype,
        name="patch",
      )
    if not 0 <= self.drop_patches < 1:
      raise ValueError(
        f"model.image.drop_patches={self.drop_patches}: wants a share, 0 or more and"
        " less than 1."
      )
    if self.distill_token and not self.class_token:
      raise ValueError("model.image.distill_token=True wants class_token=True.")
    prefix = self._prefix()
    grid = self.res // self.patch
    small = axes.kernel_init(0.02, trunk)
    if self.class_token:
      self.cls = self.param("cls", axes.boxed(small, "embed"), (trunk,))
    if self.distill_token:
      self.dist = self.param("dist", axes.boxed(small, "embed"), (trunk,))
    if self.mask_token:
      self.hidden_patch = self.param("mask", axes.boxed(small, "embed"), (trunk,))
    if self.posemb == "learned":
      table = axes.boxed(small, "pos", "embed")
      self.table = self.param("posemb", table, (prefix + grid**2, trunk))
    if self.norm_pre:
      self.first_norm = linear.LayerNorm(self.norm_eps, self.dtype, name="norm_pre")
    self.drop = dropout_lib.Dropout(self.dropout)
    if self.depth:
      self.blocks = block.stack(self)
    if self.queries:
      self.query_pool = pool_lib.QueryPool(
        self.queries, self.width, self.query_heads, self.norm_eps, self.dtype
      )
    if self.norm == "pre" and self.depth:
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
    self,
    image: jax.Array,
    *,
    hidden: jax.Array | None = None,
    whole: bool = True,
    train: bool = False,
  ) -> tokens_lib.Tokens:
    """image float [B, R, R, 3], normalised; hidden bool [B, P], patches to mask.

    whole: all tokens are wanted; else what `pooled` takes of them is enough.
    """
    if self.stem != "patch":
      x = self.conv_stem(image)
    else:
      x = self.patch_embed(patchify(image, self.patch))
    if hidden is not None:
      if not self.mask_token:
        raise ValueError("hidden patches want model.image.mask_token=True.")
      x = jnp.where(hidden[..., None], self.hidden_patch.astype(x.dtype), x)
    prefix = self._prefix()
    if prefix:
      first = [self.cls, self.dist] if self.distill_token else [self.cls]
      first = jnp.stack(first).astype(x.dtype)
      first = jnp.broadcast_to(first, (x.shape[0], *first.shape))
      x = jnp.concatenate([first, x], axis=1)
    if self.posemb != "none":
      grid = image.shape[1] // self.patch
      x = x + self._positions(grid, x.shape[-1]).astype(x.dtype)
    if train and self.drop_patches:
      x = self._keep(x, prefix)
    x = axes.constrain(x, "batch", "length", "act_embed")
    x = self.first_norm(x) if self.norm_pre else x
    x = self.drop(x, deterministic=not train)
    if not self.depth:
      return tokens_lib.Tokens(x)
    all_wanted = whole or self.queries or self.keep_raw
    at = None if all_wanted else pool_lib.place(x.shape[1], None, self.pool)
    x = block.run(self, x, at=at, train=train)
    x = self.query_pool(x) if self.queries else x
    raw = x if self.keep_raw else None
    x = self.last_norm(x) if self.norm == "pre" else x
    if self.queries:
      return tokens_lib.Tokens(x[:, 1:], pooled=x[:, 0])
    return tokens_lib.Tokens(x, raw=raw)

  def _positions(self, grid, width):
    """The table [L, D] for a grid of this side."""
    prefix = self._prefix()
    if self.posemb == "sincos2d":
      return jnp.pad(posembed.sincos2d(grid, width), ((prefix, 0), (0, 0)))
    if grid == self.res // self.patch:
      return self.table
    return posembed.resize_posembed(self.table, grid, prefix=prefix)

  def _prefix(self):
    """Tokens before the patches."""
    return int(self.class_token) + int(self.distill_token)

  def _keep(self, x, prefix):
    """Other patches of each image, in their order of drawing, behind the prefix."""
    patches = x.shape[1] - prefix
    kept = int(patches * (1.0 - self.drop_patches))
    if not kept:
      raise ValueError(
        f"model.image.drop_patches={self.drop_patches} leaves none of {patches}"
        " patches."
      )
    noise = jax.random.uniform(self.make_rng("mask"), (x.shape[0], patches))
    return keep_patches(x, noise, kept, prefix=prefix)

  def pooled(self, tokens: tokens_lib.Tokens) -> jax.Array:
    """[B, L, D] -> [B, D]."""
    if tokens.pooled is not None:
      return tokens.pooled
    if self.pool == "map":
      return self.pooler(tokens.x, tokens.mask)
    return pool_lib.pool(tokens.x, tokens.mask, self.pool)


def keep_patches(
  x: jax.Array, noise: jax.Array, kept: int, *, prefix: int
) -> jax.Array:
  """The `kept` patches of least noise of each image: [B, prefix + kept, D].

  facebookresearch/flip models_vit.py `random_masking`, as MAE's: positions are already
  added, and the tokens before the patches stay.

  Args:
    x: [B, prefix + P, D]. noise: float [B, P].
    kept: at most P.
    prefix: tokens before the patches (1: a class token).
  """
  order = jnp.argsort(noise, axis=1)[:, :kept]
  patches = jnp.take_along_axis(x[:, prefix:], order[:, :, None], axis=1)
  return jnp.concatenate([x[:, :prefix], patches], axis=1)


def patchify(image: jax.Array, patch: int) -> jax.Array:
  """[B, R, R, 3] -> [B, P, K]: patches by rows, pixels by (row, column, channel)."""
  batch, height, width, channels = image.shape
  if height % patch or width % patch:
    raise ValueError(f"image of {height}x{width} is not made of {patch}-pixel patches.")
  x = image.reshape(batch, height // patch, patch, width // patch, patch, channels)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(batch, -1, patch * patch * channels)
