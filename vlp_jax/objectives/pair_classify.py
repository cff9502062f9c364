"""Classes of a sentence about two images (NLVR2), each read with the sentence.

ViLT and METER (official modules/objectives.py compute_nlvr2): the sentence goes through
the fusion twice, the second time with the second image under a type of its own, and the
head reads both pooled pairs.

Shape letters: B batch, P width of a pooled pair, C classes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.nn import ask
from vlp_jax.nn import classifier
from vlp_jax.ops import reduce


class Objective(nn.Module):
  """Cross-entropy of batch["label"] int32 [B], given image and image2.

  Wants a fusion with types=3: the text, the first image, the second.

  Attributes:
    width: of the fused tokens, handed in by `build`; the head's hidden layer is twice
      as wide.
    classes: C.
  """

  width: int
  classes: int = 2

  def setup(self):
    self.head = classifier.Classifier(2 * self.width, self.classes)

  def columns(self, res: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """What an example has for it beside image and text: {name: (shape, dtype)}."""
    return {"image2": ((res, res, 3), "uint8"), "label": ((), "int32")}

  def __call__(self, model, enc, batch, *, teacher=None, train=False):
    size = (batch["image2_size"],) if "image2_size" in batch else ()
    second = ask.Live(train)(model, "encode_image", batch["image2"], *size)
    logits = self.logits(model, enc.image, second, enc.words, train=train)
    labels = batch["label"]
    logp = jax.nn.log_softmax(logits, axis=1)
    losses = -jnp.take_along_axis(logp, labels[:, None], axis=1)[:, 0]
    right = jnp.argmax(logits, axis=1) == labels
    return reduce.Mean.of(losses), {"accuracy": reduce.Mean.of(right)}

  def predict(self, model, image, text, image2, image2_size=None) -> jax.Array:
    """float32 [B, C]: logits without dropout; image2 is not encoded yet."""
    second = model.encode_image(image2, image2_size)
    return self.logits(model, image, second, text)

  def logits(self, model, first, second, text, *, train=False) -> jax.Array:
    """float32 [B, C] of two images' and the text's Tokens."""
    pooled = [
      model.pool_pair(model.fuse(image, text, image_type=which, train=train))
      for which, image in ((1, first), (2, second))
    ]
    return self.head(jnp.concatenate(pooled, axis=-1)).astype(jnp.float32)
