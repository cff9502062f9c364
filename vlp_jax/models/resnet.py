"""The residual networks of OpenAI's CLIP (Radford et al. 2021, section 2.4).

Official clip/model.py ModifiedResNet: ResNet-D (He 2018) with a stem of three
convolutions, blurred strides (Zhang 2019), and attention in the place of a mean at the
end. https://arxiv.org/abs/2103.00020

Shape letters: B batch, R side of the image, P places of the last map, C its channels,
D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.models import tokens as tokens_lib
from vlp_jax.nn import attention as attention_lib
from vlp_jax.nn import axes
from vlp_jax.nn import block
from vlp_jax.nn import conv_norm
from vlp_jax.ops import posembed

EXPANSION = 4  # of the channels within a block, at its end
SHRINKS = 32  # pixels of a side to one place of the last map


class Encoder(nn.Module):
  """Image [B, R, R, 3] -> Tokens of [B, P, D], P = (R / 32)², and `pooled` [B, D].

  The mean of the last map is the query of an attention to all of it: that is what CLIP
  takes of an image. The tokens are what each place of the map finds as the query, which
  costs nothing where nobody reads them; so a fusion can be put on a residual network.

  Batch norm keeps running statistics in the collection "memory" (`nn/conv_norm.py`).

  Attributes:
    width: D, that attention's output; CLIP's embed_dim, as the last layer of the
      attention is its projection (`model.project=("text",)`).
    blocks: of the four stages, (3, 4, 6, 3) of RN50.
    channels: of the first stage; each next one has twice as many.
    num_heads: of the attention; None: channels / 2, so that they are of 64 (CLIP).
    res: side of the image that the table of positions is for.
    momentum: of the running statistics.
    remat: "full" recomputes each block in the backward pass.
  """

  width: int
  blocks: tuple[int, ...] = (3, 4, 6, 3)
  channels: int = 64
  num_heads: int | None = None
  res: int = 224
  norm_eps: float = 1e-5
  momentum: float = 0.1
  backend: attention_lib.Backend = "auto"
  remat: block.Remat = "none"
  dtype: str = "float32"

  def setup(self):
    if self.res % SHRINKS:
      raise ValueError(f"model.image: res={self.res} is not a multiple of {SHRINKS}.")
    if len(self.blocks) != 4 or min(self.blocks) < 1:
      raise ValueError(
        f"model.image.blocks={self.blocks}: want four numbers of 1 or more, (3, 4, 6,"
        " 3) of RN50."
      )
    norm = dict(momentum=self.momentum, eps=self.norm_eps, dtype=self.dtype)
    half = self.channels // 2
    self.stem = [
      Unit(half, 3, 2, **norm),
      Unit(half, 3, **norm),
      Unit(self.channels, 3, **norm),
    ]
    stages = []
    for i, count in enumerate(self.blocks):
      sizes = dict(channels=self.channels << i, remat=self.remat, **norm)
      stages.append(Stage(count, stride=1 if i == 0 else 2, **sizes))
    self.stage = stages
    last = self.channels * 8 * EXPANSION
    rows = 1 + (self.res // SHRINKS) ** 2
    small = axes.boxed(axes.kernel_init(None, last), "pos", "embed")
    self.table = self.param("posemb", small, (rows, last))
    self.attend = attention_lib.Attention(
      self.num_heads or self.channels // 2,
      self.backend,
      init_std=None,
      dtype=self.dtype,
      out_width=self.width,
      name="attn",
    )

  def __call__(self, image: jax.Array, *, train: bool = False) -> tokens_lib.Tokens:
    """image float [B, R, R, 3], normalised."""
    x = image
    for unit in self.stem:
      x = nn.relu(unit(x, train=train))
    x = conv_norm.mean_pool(x, 2)
    for stage in self.stage:
      x = stage(x, train)
    grid = x.shape[1]
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    x = jnp.concatenate([x.mean(axis=1, keepdims=True), x], axis=1)
    table = self.table
    if grid != self.res // SHRINKS:
      table = posembed.resize_posembed(table, grid, prefix=1)
    x = x + table.astype(x.dtype)
    x = axes.constrain(x, "batch", "length", "act_embed")
    pooled = self.attend(x[:, :1], x)[:, 0]
    return tokens_lib.Tokens(self.attend(x[:, 1:], x), pooled=pooled)

  def pooled(self, tokens: tokens_lib.Tokens) -> jax.Array:
    """[B, D]: what the mean of the map has found."""
    return tokens.pooled


class Unit(nn.Module):
  """A convolution and its batch norm."""

  channels: int
  size: int = 1
  stride: int = 1
  first_scale: float = 1.0
  momentum: float = 0.1
  eps: float = 1e-5
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    x = conv_norm.Conv(self.channels, self.size, self.stride, self.dtype, name="conv")(
      x
    )
    norm = conv_norm.BatchNorm(
      self.momentum, self.eps, self.first_scale, self.dtype, name="norm"
    )
    return norm(x, train=train)


class Bottleneck(nn.Module):
  """x + f(x): narrow, look around, widen; strides are means (blurred)."""

  channels: int
  stride: int
  widens: bool
  momentum: float
  eps: float
  dtype: str

  @nn.compact
  def __call__(self, x, train):
    norm = dict(momentum=self.momentum, eps=self.eps, dtype=self.dtype)
    wide = self.channels * EXPANSION
    y = nn.relu(Unit(self.channels, name="narrow", **norm)(x, train=train))
    y = nn.relu(Unit(self.channels, 3, name="look", **norm)(y, train=train))
    y = conv_norm.mean_pool(y, self.stride)
    # Drawn as the identity (official: "bn3.weight" is zero at first).
    y = Unit(wide, first_scale=0.0, name="widen", **norm)(y, train=train)
    if self.widens:
      x = conv_norm.mean_pool(x, self.stride)
      x = Unit(wide, name="skip", **norm)(x, train=train)
    return nn.relu(x + y), None


class Stage(nn.Module):
  """A bottleneck that strides and widens, and `count` - 1 alike, which are scanned."""

  count: int
  channels: int
  stride: int
  remat: block.Remat
  momentum: float
  eps: float
  dtype: str

  @nn.compact
  def __call__(self, x, train):
    def layer(*, scanned):
      if self.remat == "none":
        return Bottleneck
      # 0 is the module itself, 2 is `train`; a scan keeps what is made again apart.
      again = dict(prevent_cse=not scanned, policy=block.REMAT[self.remat])
      return nn.remat(Bottleneck, static_argnums=(2,), **again)

    sizes = dict(channels=self.channels, momentum=self.momentum, eps=self.eps)
    sizes["dtype"] = self.dtype
    first = layer(scanned=False)(stride=self.stride, widens=True, name="first", **sizes)
    x, _ = first(x, train)
    if self.count == 1:
      return x
    scanned = nn.scan(
      layer(scanned=True),
      variable_axes={"params": 0, conv_norm.MEMORY: 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=self.count - 1,
      metadata_params={nn.PARTITION_NAME: "layers"},
      check_constancy_invariants=self.is_initializing(),  # see `block.scanned`
    )
    x, _ = scanned(stride=1, widens=False, name="rest", **sizes)(x, train)
    return x
