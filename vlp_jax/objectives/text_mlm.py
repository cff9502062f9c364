"""Masked language modelling of the text alone, by the text encoder.

FLAVA (Singh et al. 2022, section 3.2 of https://arxiv.org/abs/2112.04482); transformers
modeling_flava.py FlavaForPreTraining, the loss of `mlm_head`.
"""

import jax.numpy as jnp

from vlp_jax.objectives import mlm


class Objective(mlm.Objective):
  """As `mlm`, but what is read is the encoded text, which has seen no image."""

  READS = ("text",)

  def _read(self, call, model, image, ids, mask, at, *more):
    del image, more
    x = call(model, "encode_text", ids, mask).x
    x = call(self, "transform", jnp.take_along_axis(x, at[..., None], axis=1))
    scored = call(model, "word_logits", x) if self.tied else call(self, "scores", x)
    return scored + call(self, "offset")
