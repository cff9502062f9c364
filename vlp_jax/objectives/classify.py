"""Classes of fused text and image: visual entailment, reasoning over two images.

ALBEF (Li 2021, section 4; official models/model_ve.py and model_nlvr.py): an MLP on the
fused class token, and the teacher's distribution in the targets.

Shape letters: B batch, R side of the image, D width, C classes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.nn import ask
from vlp_jax.nn import block
from vlp_jax.nn import linear
from vlp_jax.ops import reduce
from vlp_jax.ops import schedule


class Objective(nn.Module):
  """Cross-entropy of the right class, batch["label"] int32 [B].

  Attributes:
    width: of the fused tokens, handed in by `build`.
    classes: C.
    images: 2: the fusion is handed a pair, batch["image"] and batch["image2"].
    act: between the two layers of the head.
    distill, distill_ramp: alpha of the teacher's distribution, as in ITC.
  """

  width: int
  classes: int
  images: int = 1
  act: block.Activation = "relu"
  distill: float = 0.0
  distill_ramp: schedule.Duration = 0

  def setup(self):
    if self.images not in (1, 2):
      raise ValueError(f"objectives.classify: images={self.images}: want 1 or 2.")
    width = self.width
    self.dense = linear.Linear("BD,DE->BE", (width, width), ("embed", "proj"))
    self.head = linear.Linear("BD,DC->BC", (width, self.classes), ("embed", None))

  def columns(self, res: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """What an example has for it beside image and text: {name: (shape, dtype)}."""
    more = {"image2": ((res, res, 3), "uint8")} if self.images == 2 else {}
    return more | {"label": ((), "int32")}

  def __call__(self, model, enc, batch, *, teacher=None, train=False):
    if self.distill and teacher is None and train:
      raise ValueError(
        "objectives.classify.distill wants a teacher: set ema_decay, e.g. 0.995."
      )
    labels = batch["label"]
    second = batch["image2"] if self.images == 2 else None
    logits = self._read(ask.Live(train), model, enc.image, enc.words, second)
    logp = jax.nn.log_softmax(logits, axis=1)
    hard = -jnp.take_along_axis(logp, labels[:, None], axis=1)[:, 0]
    losses = hard
    if self.distill and teacher is not None:
      told = teacher.enc
      other = self._read(teacher, model, told.image, told.words, second)
      soft = jax.nn.softmax(other, axis=1)
      alpha = schedule.ramp(enc.step, self.distill, self.distill_ramp)
      losses = (1.0 - alpha) * hard - alpha * jnp.sum(soft * logp, axis=1)
    right = jnp.argmax(logits, axis=1) == labels
    return reduce.Mean.of(losses), {
      "accuracy": reduce.Mean.of(right),
      "hard": reduce.Mean.of(hard),
    }

  def predict(self, model, image, text, image2=None):
    """float32 [B, C]: logits of image and text Tokens, without dropout.

    image2: the second image, not encoded, where there are two.
    """
    return self._read(ask.Live(), model, image, text, image2)

  def _read(self, call, model, image, text, image2):
    """float32 [B, C], by the live modules or by the teacher."""
    if image2 is not None:
      image = (image, call(model, "encode_image", image2))
    return call(self, "logits", call(model, "fuse", image, text).x[:, 0])

  def logits(self, x):
    """[B, D] of fused class tokens -> float32 [B, C]."""
    x = block.ACTIVATIONS[self.act](self.dense(x))
    return self.head(x).astype(jnp.float32)
