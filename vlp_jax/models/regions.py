"""Regions that a detector has found, as tokens.

VLP (Zhou et al. 2020, https://arxiv.org/abs/1909.11059, section 3.1; official
pytorch_pretrained_bert/modeling.py BertForPreTrainingLossMask `vis_embed` and
`vis_pe_embed`): what a region looks like by two layers, where it lies and what it was
classified as by one, added.

Shape letters: B batch, R regions, F features, H hidden, P numbers of a place, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.models import tokens as tokens_lib
from vlp_jax.nn import axes
from vlp_jax.nn import linear


class Encoder(nn.Module):
  """Features [B, R, F] and places [B, R, P] -> Tokens of [B, R, D].

  Attributes:
    width: D.
    features: F, of a region (the detector's fc6; 2,048).
    places: P: box, area, confidence and class probabilities (6 + 1,601).
    hidden: of the layer between (the detector's fc7); None: F.
    dropout: of both parts.
  """

  width: int
  features: int = 2048
  places: int = 1607
  hidden: int | None = None
  dropout: float = 0.0
  init_std: float | None = 0.02
  dtype: str = "float32"

  def setup(self):
    hidden = self.hidden or self.features

    def layer(into, out, names):
      return linear.Linear(
        "BRF,FD->BRD", (into, out), names, init_std=self.init_std, dtype=self.dtype
      )

    self.fc1 = layer(self.features, hidden, ("embed", "mlp"))
    self.fc2 = layer(hidden, self.width, ("mlp", "embed"))
    self.place = layer(self.places, self.width, (None, "embed"))
    self.drop = nn.Dropout(self.dropout)

  def __call__(
    self,
    features: jax.Array,
    places: jax.Array,
    mask: jax.Array | None = None,
    *,
    hidden: jax.Array | None = None,
    train: bool = False,
  ) -> tokens_lib.Tokens:
    """features float [B, R, F], places float [B, R, P]; mask and hidden bool [B, R].

    Zeros stand where the mask is false, and nothing attends to them: no region is
    there. They stand for hidden regions too, which are attended to, as in the official
    code.
    """
    looks, where = self.parts(features, places, train=train)
    x = looks + where
    if hidden is not None:
      x = jnp.where(hidden[..., None], 0.0, x)
    if mask is not None:
      x = jnp.where(mask[..., None], x, 0.0)
    return tokens_lib.Tokens(axes.constrain(x, "batch", "length", "act_embed"), mask)

  def parts(
    self, features: jax.Array, places: jax.Array, *, train: bool = False
  ) -> tuple[jax.Array, jax.Array]:
    """(what the regions look like, where they lie), each [B, R, D]."""
    for name, x, want in (
      ("features", features, self.features),
      ("places", places, self.places),
    ):
      if x.shape[-1] != want:
        raise ValueError(
          f"model.image.{name}={want}, but a region has {x.shape[-1]}: say that."
        )
    looks = nn.relu(self.fc2(nn.relu(self.fc1(features))))
    where = nn.relu(self.place(places))
    return (
      self.drop(looks, deterministic=not train),
      self.drop(where, deterministic=not train),
    )

  def pooled(self, tokens: tokens_lib.Tokens) -> jax.Array:
    """[B, R, D] -> [B, D], the mean of the real regions."""
    if tokens.mask is None:
      return tokens.x.mean(axis=1)
    weight = tokens.mask[..., None].astype(tokens.x.dtype)
    return (tokens.x * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1.0)
