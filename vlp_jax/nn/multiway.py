"""Transformer layers whose parameters differ by modality: one stream a modality.

VLMo: Bao et al. 2021, section 3.2 of https://arxiv.org/abs/2111.02358; official
vlmo/modules/multiway_transformer.py. BEiT-3: Wang et al. 2022, section 2.1 of
https://arxiv.org/abs/2208.10442; torchscale architecture/encoder.py with multiway=True.

Shape letters: B batch, L length of a stream, S of all of them, D width, N heads,
H head_dim, F mlp.
"""

from collections.abc import Callable, Mapping
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.nn import attention as attention_lib
from vlp_jax.nn import axes
from vlp_jax.nn import block
from vlp_jax.nn import dropout as dropout_lib
from vlp_jax.nn import linear
from vlp_jax.ops import distance

# The streams, in the order in which attention sees them.
STREAMS = ("image", "text")
Streams = Mapping[str, jax.Array]  # {stream: [B, L, D]}, one or both


def each(separate: bool, base: str, make: Callable[..., nn.Module]) -> dict:
  """{stream: module}: one of its own for each, "base_image", or one for all, "base"."""
  if separate:
    return {name: make(name=f"{base}_{name}") for name in STREAMS}
  return dict.fromkeys(STREAMS, make(name=base))


class Attention(nn.Module):
  """Every token attends to those of all streams.

  Attributes:
    separate: projections of each stream's own (BEiT-3), or shared ones (VLMo).
    subln: a norm before the last projection (Magneto, arXiv:2210.06423).
    distances: (patches along a side of the image, words of the longest text): biases of
      the logits, learned for every distance of two tokens (VLMo, see
      `ops/distance.py`); None: there are none.
  """

  num_heads: int
  separate: bool = True
  subln: bool = False
  norm_eps: float = 1e-5
  backend: attention_lib.Backend = "auto"
  dropout: float = 0.0
  init_std: float | None = 0.02
  dtype: str = "float32"
  distances: tuple[int, int] | None = None

  @nn.compact
  def __call__(
    self, x: Streams, mask: jax.Array | None = None, *, train: bool = False
  ) -> dict[str, jax.Array]:
    """mask bool [B, 1, 1|S, S] of the streams one after the other."""
    width = next(iter(x.values())).shape[-1]
    if width % self.num_heads:
      raise ValueError(
        f"width {width} is not a multiple of num_heads {self.num_heads}."
      )
    heads = (self.num_heads, width // self.num_heads)
    common = dict(init_std=self.init_std, dtype=self.dtype)

    def project(base):
      names = ("embed", "heads", "head_dim")
      make = functools.partial(
        linear.Linear, "BLD,DNH->BLNH", (width, *heads), names, **common
      )
      layers = each(self.separate, base, make)
      y = jnp.concatenate([layers[name](x[name]) for name in x], axis=1)
      return axes.constrain(y, "batch", "length", "act_heads", None)

    query, key, value = project("query"), project("key"), project("value")
    bias = self._biases(x)
    mixed = attention_lib.attend(self, query, key, value, mask, train, bias)
    parts = split(mixed, x)
    if self.subln:
      make = functools.partial(linear.LayerNorm, self.norm_eps, self.dtype)
      norms = each(self.separate, "norm_inner", make)
      flat = {name: y.reshape(*y.shape[:2], width) for name, y in parts.items()}
      parts = {n: norms[n](y).reshape(parts[n].shape) for n, y in flat.items()}
    names = ("heads", "head_dim", "embed")
    make = functools.partial(
      linear.Linear, "BLNH,NHD->BLD", (*heads, width), names, **common
    )
    layers = each(self.separate, "out", make)
    return {name: layers[name](y) for name, y in parts.items()}

  def _biases(self, x):
    """float32 [1, N, S, S] of the table of distances, or None."""
    if self.distances is None:
      return None
    side, words = self.distances
    table = self.param(
      "distance",
      axes.boxed(nn.initializers.zeros, "pos", "heads"),
      (distance.rows(side, words), self.num_heads),
    )
    if self.is_initializing():
      return None  # A stream that is not there is one token then.
    count = {name: x[name].shape[1] if name in x else 0 for name in STREAMS}
    rows_SS = distance.index(*count.values(), side=side, words=words)
    return jnp.einsum("SZN->NSZ", table.astype(jnp.float32)[rows_SS])[None]


class Expert(nn.Module):
  """A block's MLP, D -> F -> D, with a norm in it (`subln`)."""

  mlp_dim: int
  act: block.Activation = "gelu"
  subln: bool = False
  norm_eps: float = 1e-5
  init_std: float | None = 0.02
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width, common = x.shape[-1], dict(init_std=self.init_std, dtype=self.dtype)
    shape, names = (width, self.mlp_dim), ("embed", "mlp")
    x = linear.Linear("BLD,DF->BLF", shape, names, name="up", **common)(x)
    x = axes.constrain(block.ACTIVATIONS[self.act](x), "batch", "length", "act_mlp")
    if self.subln:
      x = linear.LayerNorm(self.norm_eps, self.dtype, name="norm")(x)
    shape, names = (self.mlp_dim, width), ("mlp", "embed")
    return linear.Linear("BLF,FD->BLD", shape, names, name="down", **common)(x)


class Layer(nn.Module):
  """x + attention(norm(x)) over all streams, then x + expert(norm(x)) in each.

  Is called as `block.Block`, but x and what it returns are Streams.

  Attributes:
    separate: attention and its norm have parameters of each stream's own.
    subln: see `Attention` and `Expert`.
    pair_expert: a third expert, for both streams where there are two (VLMo's VL-FFN).
    layer_scale: first value of a learned factor of each branch; None: there is none.
    distances: see `Attention`.
  """

  num_heads: int
  mlp_dim: int
  separate: bool = True
  subln: bool = False
  pair_expert: bool = False
  layer_scale: float | None = None
  distances: tuple[int, int] | None = None
  norm_eps: float = 1e-5
  act: block.Activation = "gelu"
  dropout: float = 0.0
  dropout_attention: float = 0.0
  backend: attention_lib.Backend = "auto"
  init_std: float | None = 0.02
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x, own, mask, memory, memory_mask, train):
    """x Streams, own block.Own, mask bool [B, 1, 1, S] or None; no memory."""
    del memory, memory_mask
    given = tuple(x)
    if self.is_initializing():
      # All experts get their parameters, whichever stream comes first in a run.
      none = jnp.zeros_like(next(iter(x.values()))[:, :1])
      x, mask = {name: x.get(name, none) for name in STREAMS}, None
    norm = functools.partial(linear.LayerNorm, self.norm_eps, self.dtype)
    attend = Attention(
      self.num_heads,
      self.separate,
      self.subln,
      self.norm_eps,
      self.backend,
      self.dropout_attention,
      self.init_std,
      self.dtype,
      self.distances,
      name="attn",
    )
    norms = each(self.separate, "norm_attn", norm)
    y = attend({n: norms[n](v) for n, v in x.items()}, mask, train=train)
    x = self._add(x, y, "scale_attn", own.drop_path, train)
    fields = (self.act, self.subln, self.norm_eps, self.init_std, self.dtype)
    expert = functools.partial(Expert, self.mlp_dim, *fields)
    norms, experts = each(True, "norm_mlp", norm), each(True, "mlp", expert)
    y = {n: experts[n](norms[n](v)) for n, v in x.items()}
    if self.pair_expert and len(x) == 2:
      pair_norm, pair_mlp = norm(name="norm_mlp_pair"), expert(name="mlp_pair")
      y = {n: pair_mlp(pair_norm(v)) for n, v in x.items()}
    x = self._add(x, y, "scale_mlp", own.drop_path, train)
    x = {
      name: axes.constrain(x[name], "batch", "length", "act_embed") for name in given
    }
    return x, None

  def _add(self, x, y, scale, drop_path, train):
    """The branch y on x, scaled and dropped as one sequence."""
    y = join(y)
    if self.layer_scale is not None:
      first = nn.initializers.constant(self.layer_scale)
      factor = self.param(scale, axes.boxed(first, "embed"), (y.shape[-1],))
      y = y * factor.astype(y.dtype)
    y = dropout_lib.Dropout(self.dropout)(y, deterministic=not train)
    y = split(block.drop_paths(self, y, drop_path, train=train), x)
    return {name: x[name] + y[name] for name in x}


def join(x: Streams) -> jax.Array:
  """[B, S, …]: the streams one after the other."""
  return jnp.concatenate(list(x.values()), axis=1)


def split(x: jax.Array, like: Streams) -> dict[str, jax.Array]:
  """[B, S, …] cut into streams as long as those of `like`."""
  ends, parts = 0, {}
  for name, stream in like.items():
    begin, ends = ends, ends + stream.shape[1]
    parts[name] = x[:, begin:ends]
  return parts
