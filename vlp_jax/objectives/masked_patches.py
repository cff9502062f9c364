"""Masked prediction: hidden patches say what the teacher says of them, seeing all.

TIPS (Maninis et al. 2024, https://arxiv.org/abs/2410.16512, section 3.2), as SigLIP 2
(Tschannen et al. 2025, https://arxiv.org/abs/2502.14786, section 2.3) takes it up: the
loss of self-distillation, of patches instead of the pooled image.

Shape letters: B batch, P patches, M hidden ones, D width, K prototypes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.nn import ask
from vlp_jax.nn import prototypes as prototypes_lib
from vlp_jax.ops import distill as distill_lib
from vlp_jax.ops import reduce
from vlp_jax.ops import schedule


class Objective(nn.Module):
  """Both see the same view; of the model's, some patches are a learned mask token.

  Wants ema_decay, and model.image.mask_token=True. Outside of training, where no
  teacher is given, the model is its own.

  Attributes:
    rate: share of the patches that are hidden, so many of each image.
    area: bounds of the view's share of the image.
    prototypes, hidden, bottleneck: sizes of the head, see `nn/prototypes.py`.
    student_temp, teacher_temp, momentum: see `ops/distill.py`.
    start: the loss is 0 before this step (a Duration), though its work is done.
  """

  rate: float = 0.5
  area: tuple[float, float] = (0.4, 1.0)
  prototypes: int = 65_536
  hidden: int = 2048
  bottleneck: int = 256
  student_temp: float = 0.1
  teacher_temp: float = 0.04
  momentum: float = 0.9
  start: schedule.Duration = 0

  READS = ("image",)

  @nn.compact
  def __call__(self, model, enc, batch, *, teacher=None, train=False):
    if teacher is None and train:
      raise ValueError(
        "objectives.masked_patches wants a teacher: set ema_decay, e.g. 0.996."
      )
    sizes = (self.prototypes, self.hidden, self.bottleneck)
    head = prototypes_lib.Prototypes(*sizes, name="head")
    image = batch["image"]
    keys = jax.random.split(self.make_rng("sample"), 3)
    window = distill_lib.windows(keys[0], len(image), area=self.area)
    view = distill_lib.flip(keys[1], distill_lib.crop(image, window, image.shape[1]))
    patches = (image.shape[1] // model.image.patch) ** 2
    at_BM, hidden_BP = hide(keys[2], len(image), patches, self.rate)

    def read(call, *more):
      x = call(model, "encode_image", view, None, *more).x
      x = x[:, x.shape[1] - patches :]
      x = jnp.take_along_axis(x, at_BM[..., None], axis=1)
      return call(head, "__call__", x)

    student_BMK = read(ask.Live(train), hidden_BP)
    teacher_BMK = jax.lax.stop_gradient(read(teacher or ask.Live()))
    shape = (self.prototypes,)
    center = self.variable("memory", "center", lambda: jnp.zeros(shape, jnp.float32))
    losses = distill_lib.consistency(
      student_BMK,
      teacher_BMK,
      center.value,
      student_temp=self.student_temp,
      teacher_temp=self.teacher_temp,
    )
    if train and not self.is_initializing() and self.is_mutable_collection("memory"):
      center.value = distill_lib.recenter(center.value, teacher_BMK, self.momentum)
    losses = losses * schedule.begun(enc.step, self.start)
    return reduce.Mean.of(losses), {}


def hide(
  key: jax.Array, batch: int, patches: int, rate: float
) -> tuple[jax.Array, jax.Array]:
  """(int32 [B, M] places, bool [B, P]): other patches of each image, in equal number.

  Raises:
    ValueError: the share hides none or all.
  """
  count = round(patches * rate)
  if not 0 < count < patches:
    raise ValueError(
      f"objectives.masked_patches.rate={rate} hides {count} of {patches} patches: want"
      " some, and not all."
    )
  noise = jax.random.uniform(key, (batch, patches))
  at = jnp.sort(jnp.argsort(noise, axis=1)[:, :count], axis=1)
  hidden = jnp.zeros((batch, patches), bool)
  return at, hidden.at[jnp.arange(batch)[:, None], at].set(True)
