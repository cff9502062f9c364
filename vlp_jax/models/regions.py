"""Regions that a detector has found, as tokens; and the rows that they come in.

VLP (Zhou et al. 2020, https://arxiv.org/abs/1909.11059, section 3.1; official
pytorch_pretrained_bert/modeling.py BertForPreTrainingLossMask `vis_embed` and
`vis_pe_embed`): what a region looks like by two layers, where it lies and what it was
classified as by one, added.

Shape letters: B batch, R regions, F features, H hidden, P numbers of a place,
C classes, D width.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from vlp_jax.models import tokens as tokens_lib
from vlp_jax.nn import axes
from vlp_jax.nn import dropout as dropout_lib
from vlp_jax.nn import linear


@flax.struct.dataclass
class Rows:
  """features [B, R, F], places [B, R, P], classes [B, R, C], mask bool [B, R]."""

  features: jax.Array
  places: jax.Array
  classes: jax.Array
  mask: jax.Array


def split(rows: jax.Array, features: int, places: int, classes: int) -> Rows:
  """The parts of rows [B, R, F + P + C + 1], which `data/regions.py` puts together.

  Raises:
    ValueError: they are of another width.
  """
  wants = features + places + classes + 1
  if rows.ndim != 3 or rows.shape[-1] != wants:
    raise ValueError(
      f"model.image reads regions [B, R, {wants}], {features} features, {places}"
      f" numbers of a place, {classes} classes and 1, but the image is"
      f' {list(rows.shape)}: say data.pp="regions(…)", and the same sizes in both.'
    )
  ends = (features, features + places, wants - 1)
  parts = jnp.split(rows, ends, axis=-1)
  return Rows(*parts[:3], parts[3][..., 0] > 0)


def mean(tokens: tokens_lib.Tokens) -> jax.Array:
  """[B, R, D] -> [B, D], of the real regions."""
  if tokens.mask is None:
    return tokens.x.mean(axis=1)
  weight = tokens.mask[..., None].astype(tokens.x.dtype)
  return (tokens.x * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1.0)


class Encoder(nn.Module):
  """Rows of regions float [B, R, F + P + 1] -> Tokens of [B, R, D].

  Attributes:
    width: D.
    regions: R, rows of an image.
    features: F, of a region (the detector's fc6; 2,048).
    places: P: box, area, confidence and class probabilities (6 + 1,601).
    hidden: of the layer between (the detector's fc7); None: F.
    dropout: of both parts.
  """

  width: int
  regions: int = 100
  features: int = 2048
  places: int = 1607
  hidden: int | None = None
  dropout: float = 0.0
  init_std: float | None = 0.02
  dtype: str = "float32"

  @property
  def res(self) -> tuple[int, int]:
    """Shape of what stands for an image."""
    return self.regions, self.features + self.places + 1

  def setup(self):
    hidden = self.hidden or self.features

    def layer(into, out, names):
      return linear.Linear(
        "BRF,FD->BRD", (into, out), names, init_std=self.init_std, dtype=self.dtype
      )

    self.fc1 = layer(self.features, hidden, ("embed", "mlp"))
    self.fc2 = layer(hidden, self.width, ("mlp", "embed"))
    self.place = layer(self.places, self.width, (None, "embed"))
    self.drop = dropout_lib.Dropout(self.dropout)

  def __call__(
    self, rows: jax.Array, *, hidden: jax.Array | None = None, train: bool = False
  ) -> tokens_lib.Tokens:
    """rows float [B, R, F + P + 1]; hidden bool [B, R].

    Zeros stand where no region is, and nothing attends to them. They stand for hidden
    regions too, which are attended to, as in the official code.
    """
    found = split(rows, self.features, self.places, 0)
    looks, where = self.parts(found.features, found.places, train=train)
    x = looks + where
    if hidden is not None:
      x = jnp.where(hidden[..., None], 0.0, x)
    x = jnp.where(found.mask[..., None], x, 0.0)
    x = axes.constrain(x, "batch", "length", "act_embed")
    return tokens_lib.Tokens(x, found.mask)

  def parts(
    self, features: jax.Array, places: jax.Array, *, train: bool = False
  ) -> tuple[jax.Array, jax.Array]:
    """(what the regions look like, where they lie), each [B, R, D]."""
    looks = nn.relu(self.fc2(nn.relu(self.fc1(features))))
    where = nn.relu(self.place(places))
    return (
      self.drop(looks, deterministic=not train),
      self.drop(where, deterministic=not train),
    )

  def pooled(self, tokens: tokens_lib.Tokens) -> jax.Array:
    """[B, R, D] -> [B, D], the mean of the real regions."""
    return mean(tokens)
