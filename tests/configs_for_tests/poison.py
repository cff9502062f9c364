"""An objective that goes wrong for one image: for tests of runs with bad steps."""

import flax.linen as nn
import jax.numpy as jnp

from vlp_jax.ops import reduce


class Objective(nn.Module):
  """Its loss is `value` where the image is in the batch, and 0 elsewhere.

  Attributes:
    image_id: of the image. value: "nan", or a number.
  """

  image_id: int
  value: float | str = "nan"

  @nn.compact
  def __call__(self, model, enc, batch, *, teacher=None, train=False):
    hit = jnp.any(batch["image_id"] == self.image_id)
    # By way of a parameter's number, so that its gradient is not finite either.
    kind = enc.zimg[0, 0] * 0.0 + jnp.float32(float(self.value))
    loss = jnp.where(hit, kind, 0.0)
    return reduce.Mean(loss, jnp.float32(1.0)), {}
