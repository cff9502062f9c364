"""Masked region modelling: what is hidden of an image, from the rest and from the text.

UNITER (Chen et al. 2020, section 3.2 of https://arxiv.org/abs/1909.11740), three
variants; official model/pretrain.py RegionFeatureRegression, RegionClassification. The
text is whole where regions are hidden, and the image where words are: one modality is
masked at a time ("conditional masking").

Shape letters: B batch, N regions, F features, C classes, D width.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.nn import ask
from vlp_jax.nn import axes
from vlp_jax.nn import block
from vlp_jax.nn import linear
from vlp_jax.ops import mask as mask_lib
from vlp_jax.ops import reduce


class Objective(nn.Module):
  """Predicts hidden regions; wants model.image.type="normed_regions".

  Attributes:
    width: of the fused tokens, handed in by `build`.
    target: "features": the squared error of the features, by the transposed matrix that
      embeds them (MRFR). "class": the cross-entropy of the detector's most probable
      class (MRC), of which the first, the ground, is never one. "distribution": the
      divergence from the detector's probabilities (MRC-kl).
    rate: chance of a region to be hidden; at least one of an image is.
    act, norm_eps: of the head.
  """

  width: int
  target: Literal["features", "class", "distribution"] = "features"
  rate: float = 0.15
  act: block.Activation = "gelu"
  norm_eps: float = 1e-12
  init_std: float | None = 0.02

  def __call__(self, model, enc, batch, *, teacher=None, train=False):
    del teacher
    if not hasattr(model.image, "looks"):
      raise ValueError(
        "objectives: masked region modelling (mrm) wants regions: set"
        ' model.image.type="normed_regions", and data.pp="regions(…)".'
      )
    real = model.image.split(batch["image"]).mask
    hidden = mask_lib.hide_some(self.make_rng("mask"), real, self.rate)
    return self.loss(model, enc, batch, hidden, train=train)

  def loss(self, model, enc, batch, hidden, *, train):
    """Mean of what the hidden regions, bool [B, N], cost, and its metrics."""
    rows = model.image.split(batch["image"])
    call = ask.Live(train)
    image = call(model, "encode_image", batch["image"], None, hidden)
    fused = model.fused_image(call(model, "fuse", image, enc.words))
    predicted = self.predict(model.image, fused.x)
    if self.target == "features":
      return reduce.Mean.of(regression(predicted, rows.features), hidden), {}
    losses = class_loss if self.target == "class" else divergence
    label = classes(rows.classes)
    right = jnp.argmax(predicted[..., 1:], axis=-1) + 1 == label
    metrics = {"accuracy": reduce.Mean.of(right, hidden)}
    return reduce.Mean.of(losses(predicted, rows.classes), hidden), metrics

  @nn.compact
  def predict(self, image, x):
    """float32 [B, N, F or C] of fused tokens x [B, N, D]; image: the encoder."""
    width = self.width
    shape, names = (width, width), ("embed", "proj")
    std = dict(init_std=self.init_std)
    dense = linear.Linear("BND,DE->BNE", shape, names, name="dense", **std)
    x = block.ACTIVATIONS[self.act](dense(x))
    x = linear.LayerNorm(self.norm_eps, name="norm")(x)
    if self.target == "features":
      zeros = axes.boxed(nn.initializers.zeros_init(), None)
      return image.looks(x) + self.param("bias", zeros, (image.features,))
    shape, names = (width, image.classes), ("embed", "vocab")
    decoder = linear.Linear("BND,DC->BNC", shape, names, name="decoder", **std)
    return decoder(x).astype(jnp.float32)


def regression(predicted_BNF: jax.Array, features_BNF: jax.Array) -> jax.Array:
  """float32 [B, N]: the mean square of the difference, over the features (MRFR)."""
  return jnp.mean((predicted_BNF - features_BNF) ** 2, axis=-1)


def classes(labels_BNC: jax.Array) -> jax.Array:
  """int32 [B, N]: the most probable class but the first, which is the ground."""
  return (jnp.argmax(labels_BNC[..., 1:], axis=-1) + 1).astype(jnp.int32)


def class_loss(logits_BNC: jax.Array, labels_BNC: jax.Array) -> jax.Array:
  """float32 [B, N]: cross-entropy of the most probable class (MRC)."""
  logp_BNC = jax.nn.log_softmax(logits_BNC, axis=-1)
  at = classes(labels_BNC)[..., None]
  return -jnp.take_along_axis(logp_BNC, at, axis=-1)[..., 0]


def divergence(logits_BNC: jax.Array, labels_BNC: jax.Array) -> jax.Array:
  """float32 [B, N]: of the labels from the prediction, mean over the classes (MRC-kl).

  KL(labels || softmax(logits)) / C: the official code takes the mean of all that
  torch's `kl_div` returns; the paper has no C.
  """
  logp_BNC = jax.nn.log_softmax(logits_BNC, axis=-1)
  own_BNC = jnp.where(labels_BNC > 0, jnp.log(jnp.maximum(labels_BNC, 1e-30)), 0.0)
  return jnp.mean(labels_BNC * (own_BNC - logp_BNC), axis=-1)
