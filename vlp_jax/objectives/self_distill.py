"""Self-distillation: parts of an image say what the teacher says of the whole.

SILC (Naeem et al. 2023, https://arxiv.org/abs/2310.13355, section 3.2), as SigLIP 2
(Tschannen et al. 2025, https://arxiv.org/abs/2502.14786, section 2.3) takes it up; loss
and head are DINO's.

Shape letters: B batch, N local views, K prototypes.
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
  """Local views by the model, one global view by its moving average (wants ema_decay).

  Views are windows of the batch's images. Outside of training, where no teacher is
  given, the model is its own.

  Attributes:
    views: N. res: side of a local view in pixels; global ones are as the image.
    local_area, global_area: bounds of a window's share of the image.
    prototypes, hidden, bottleneck: sizes of the head, see `nn/prototypes.py`.
    student_temp, teacher_temp, momentum: see `ops/distill.py`.
    start: the loss is 0 before this step (a Duration), though its work is done.
  """

  views: int = 8
  res: int = 96
  local_area: tuple[float, float] = (0.05, 0.4)
  global_area: tuple[float, float] = (0.4, 1.0)
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
        "objectives.self_distill wants a teacher: set ema_decay, e.g. 0.996."
      )
    sizes = (self.prototypes, self.hidden, self.bottleneck)
    head = prototypes_lib.Prototypes(*sizes, name="head")

    def read(call, image):
      pooled = call(model.image, "pooled", call(model, "encode_image", image))
      return call(head, "__call__", pooled[:, None])[:, 0]

    whole, parts = self.draw(batch["image"])
    student_BNK = read(ask.Live(train), parts).reshape(len(whole), self.views, -1)
    teacher_BK = jax.lax.stop_gradient(read(teacher or ask.Live(), whole))
    shape = (self.prototypes,)
    center = self.variable("memory", "center", lambda: jnp.zeros(shape, jnp.float32))
    losses = distill_lib.consistency(
      student_BNK,
      teacher_BK[:, None],
      center.value,
      student_temp=self.student_temp,
      teacher_temp=self.teacher_temp,
    )
    if train and not self.is_initializing() and self.is_mutable_collection("memory"):
      center.value = distill_lib.recenter(center.value, teacher_BK, self.momentum)
    losses = losses * schedule.begun(enc.step, self.start)
    return reduce.Mean.of(losses), {}

  def draw(self, image):
    """([B, R, R, 3] global views, [B * N, res, res, 3] local views, an image's
    together) of images [B, R, R, 3]."""
    keys = jax.random.split(self.make_rng("sample"), 4)
    window = distill_lib.windows(keys[0], len(image), area=self.global_area)
    whole = distill_lib.flip(keys[1], distill_lib.crop(image, window, image.shape[1]))
    image = jnp.repeat(image, self.views, axis=0)
    window = distill_lib.windows(keys[2], len(image), area=self.local_area)
    parts = distill_lib.flip(keys[3], distill_lib.crop(image, window, self.res))
    return whole, parts
