"""Which hidden region belongs where: each place has to find its own looks.

VLP's official code (pytorch_pretrained_bert/modeling.py, "Selfie-like pretext", after
Trinh et al. 2019, https://arxiv.org/abs/1906.02940).

Shape letters: B batch, M hidden regions of an image, D width.
"""

import jax
import jax.numpy as jnp


def loss(
  looks_BMD: jax.Array, places_BMD: jax.Array, pooled_BD: jax.Array
) -> jax.Array:
  """float32 [B]: mean cross-entropy of each place's own looks among those of its image.

  Args:
    looks_BMD, places_BMD: of the hidden regions, embedded: `models/regions.py` `parts`.
    pooled_BD: of the pair whose regions are hidden.
  """
  query_BMD = (places_BMD + pooled_BD[:, None]).astype(jnp.float32)
  logits_BMM = jnp.einsum("BMD,BND->BMN", query_BMD, looks_BMD.astype(jnp.float32))
  logp_BMM = jax.nn.log_softmax(logits_BMM, axis=-1)
  return -jnp.diagonal(logp_BMM, axis1=1, axis2=2).mean(axis=1)
