"""Masked image modelling: the discrete code of each hidden patch.

BEiT (Bao et al. 2022), FLAVA (Singh et al. 2022, section 3.2 of
https://arxiv.org/abs/2112.04482); transformers modeling_flava.py
FlavaMaskedPredictionHead.

Shape letters: B batch, P patches, D width, C codes.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.nn import ask
from vlp_jax.nn import block
from vlp_jax.nn import linear
from vlp_jax.objectives import masked_patches
from vlp_jax.ops import blocks as blocks_lib
from vlp_jax.ops import reduce


class Objective(nn.Module):
  """Cross-entropy of codes int32 [B, P] at the patches that are hidden.

  Wants model.image.mask_token=True. The image alone is read.

  Attributes:
    width: of the tokens, handed in by `build`.
    codes: C, 8192 of DALL-E's dVAE. patches: P, of the codes.
    targets: where they come from: "column" of the data, batch["codes"], or "codebook",
      the model's own, which reads the image.
    rate: share of the patches that are hidden.
    blocks: they are hidden in rectangles (`ops/blocks.py`); 0: evenly drawn. So many
      patches a rectangle has at least.
    act, norm_eps: of the head.
    transformed: the head has a layer, activation and norm before its matrix.
  """

  width: int
  codes: int = 8192
  patches: int = 196
  targets: Literal["column", "codebook"] = "column"
  rate: float = 0.4
  blocks: int = 0
  act: block.Activation = "gelu"
  norm_eps: float = 1e-12
  init_std: float | None = 0.02
  transformed: bool = True

  READS = ("image",)

  def setup(self):
    width = self.width
    self.dense = linear.Linear(
      "BPD,DE->BPE", (width, width), ("embed", "proj"), init_std=self.init_std
    )
    self.norm = linear.LayerNorm(self.norm_eps)
    self.decoder = linear.Linear(
      "BPD,DC->BPC", (width, self.codes), ("embed", "vocab"), init_std=self.init_std
    )

  def columns(self, res: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """What an example has for it beside image and text: {name: (shape, dtype)}."""
    del res
    return {"codes": ((self.patches,), "int32")} if self.targets == "column" else {}

  def __call__(self, model, enc, batch, *, teacher=None, train=False):
    del teacher
    hidden = self.hide(len(batch["image"]))
    image = ask.Live(train)(model, "encode_image", batch["image"], None, hidden)
    return self.loss(image.x, self.codes_of(model, batch), hidden)

  def codes_of(self, model, batch):
    """int32 [B, P]: what hidden patches have to say."""
    if self.targets == "codebook":
      return model.image_codes(batch["image"])
    return batch["codes"]

  def hide(self, rows):
    """bool [B, P]: the patches to hide."""
    if self.blocks:
      return blocks_lib.hide(
        self.make_rng("mask"), rows, self.patches, self.rate, least=self.blocks
      )
    return masked_patches.hide(self.make_rng("mask"), rows, self.patches, self.rate)[1]

  def loss(self, x, codes, hidden):
    """Mean cross-entropy at the hidden patches of tokens x [B, (1 +) P, D].

    Args:
      x: of the encoder, or fused; patches stand last.
      codes: int32 [B, P]. hidden: bool [B, P], which count.
    """
    if codes.shape != hidden.shape or x.shape[1] < codes.shape[1]:
      raise ValueError(
        f"codes are {list(codes.shape)}, but {list(hidden.shape)} patches are"
        f" hidden of tokens {list(x.shape[:2])}: set objectives.mim.patches to those of"
        " the model."
      )
    logits = self.logits(x)
    logp = jax.nn.log_softmax(logits, axis=-1)
    losses = -jnp.take_along_axis(logp, codes[..., None], axis=-1)[..., 0]
    right = jnp.argmax(logits, axis=-1) == codes
    return reduce.Mean.of(losses, hidden), {"accuracy": reduce.Mean.of(right, hidden)}

  def logits(self, x):
    """float32 [B, P, C] of tokens [B, (1 +) P, D], without a class token's."""
    x = x[:, x.shape[1] - self.patches :]
    if self.transformed:
      x = self.norm(block.ACTIVATIONS[self.act](self.dense(x)))
    return self.decoder(x).astype(jnp.float32)
