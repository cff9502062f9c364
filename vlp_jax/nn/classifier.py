"""A head of two layers over one vector."""

import flax.linen as nn
import jax

from vlp_jax.nn import block
from vlp_jax.nn import linear


class Classifier(nn.Module):
  """Linear, layer norm, GELU, linear: [B, P] -> [B, C].

  ViLT's and METER's head of VQA and NLVR2 (their `vqa_classifier`, after BAN's).
  """

  hidden: int
  classes: int
  norm_eps: float = 1e-5  # torch's own
  init_std: float | None = 0.02

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    common = dict(init_std=self.init_std)
    shape, names = (x.shape[-1], self.hidden), ("embed", "mlp")
    x = linear.Linear("BP,PZ->BZ", shape, names, name="dense", **common)(x)
    x = block.ACTIVATIONS["gelu"](linear.LayerNorm(self.norm_eps, name="norm")(x))
    shape, names = (self.hidden, self.classes), ("mlp", None)
    return linear.Linear("BZ,ZC->BC", shape, names, name="out", **common)(x)
