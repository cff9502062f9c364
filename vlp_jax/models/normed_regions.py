"""Regions that a detector has found, as tokens of a BERT: each part normed (UNITER).

Chen et al. 2020, https://arxiv.org/abs/1909.11740, section 3.1; official model/model.py
UniterImageEmbeddings: what a region looks like and where it lies, a linear layer and a
norm each, are added to the embedding of the second type, and normed again.

Shape letters: B batch, N regions, F features, P numbers of a place, C classes, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.models import regions as regions_lib
from vlp_jax.models import tokens as tokens_lib
from vlp_jax.nn import axes
from vlp_jax.nn import dropout as dropout_lib
from vlp_jax.nn import embed
from vlp_jax.nn import linear


class Encoder(nn.Module):
  """Rows of regions float [B, N, F + P + C + 1] -> Tokens of [B, N, D].

  Attributes:
    width: D.
    regions: N, rows of an image.
    features: F. places: P. classes: C, which are for objectives, and not read.
    dropout: of the embeddings.
  """

  width: int
  regions: int = 100
  features: int = 2048
  places: int = 7
  classes: int = 1601
  norm_eps: float = 1e-12
  dropout: float = 0.0
  init_std: float | None = 0.02
  dtype: str = "float32"

  @property
  def res(self) -> tuple[int, int]:
    """Shape of what stands for an image."""
    return self.regions, self.features + self.places + self.classes + 1

  def setup(self):
    def layer(into):
      return linear.Linear(
        "BNF,FD->BND",
        (into, self.width),
        (None, "embed"),
        init_std=self.init_std,
        dtype=self.dtype,
      )

    norm = lambda: linear.LayerNorm(self.norm_eps, self.dtype)
    self.feature, self.feature_norm = layer(self.features), norm()
    self.place, self.place_norm = layer(self.places), norm()
    self.type = embed.Embed(1, self.width, axis="pos", dtype=self.dtype)
    # What a hidden region has in the place of its features.
    small = axes.kernel_init(0.02, self.features)
    self.hidden_region = self.param("mask", axes.boxed(small, None), (self.features,))
    self.norm = norm()
    self.drop = dropout_lib.Dropout(self.dropout)

  def split(self, rows: jax.Array) -> regions_lib.Rows:
    """The parts of rows [B, N, F + P + C + 1]."""
    return regions_lib.split(rows, self.features, self.places, self.classes)

  def __call__(
    self, rows: jax.Array, *, hidden: jax.Array | None = None, train: bool = False
  ) -> tokens_lib.Tokens:
    """rows float [B, N, F + P + C + 1]; hidden bool [B, N], whose looks are masked.

    Where no region is, nothing is attended to.
    """
    found = self.split(rows)
    features = found.features
    if hidden is not None:
      features = jnp.where(hidden[..., None], self.hidden_region, features)
    x = self.feature_norm(self.feature(features))
    x = x + self.place_norm(self.place(found.places)) + self.type(jnp.int32(0))
    x = self.drop(self.norm(x), deterministic=not train)
    x = axes.constrain(x, "batch", "length", "act_embed")
    return tokens_lib.Tokens(x, found.mask)

  def looks(self, x: jax.Array) -> jax.Array:
    """[..., D] -> float32 [..., F], by the layer of the features turned round.

    What is regressed to features is tied so (official RegionFeatureRegression).
    """
    kernel = nn.unbox(self.feature.get_variable("params", "kernel"))
    return jnp.einsum(
      "...D,FD->...F",
      x.astype(self.dtype),
      kernel.astype(self.dtype),
      preferred_element_type=jnp.float32,
    )

  def pooled(self, tokens: tokens_lib.Tokens) -> jax.Array:
    """[B, N, D] -> [B, D], the mean of the real regions."""
    return regions_lib.mean(tokens)
