"""Image-text contrast: softmax or sigmoid, momentum queues, soft targets.

CLIP (Radford 2021), SigLIP (Zhai 2023), MoCo-style queues and soft targets of ALBEF
(Li 2021, sections 3.2 and 3.3; official model_pretrain.py and model_retrieval.py).

Shape letters: B batch, E embedding, Q queue, C candidates (B + Q).
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.nn import axes
from vlp_jax.ops import contrastive
from vlp_jax.ops import reduce
from vlp_jax.ops import schedule


class Objective(nn.Module):
  """Pulls an image and its text together, apart from the rest of the global batch.

  The candidates are the live embeddings of the batch; with a queue or distillation they
  are the teacher's and, behind them, the queue of its earlier ones.

  Attributes:
    loss: "softmax" (InfoNCE, both ways, averaged) or "sigmoid" (SigLIP), which has a
      learned bias.
    bias: its first value.
    queue: Q, earlier embeddings kept; wants a teacher, and Q >= the batch.
    distill: alpha, share of the teacher's softmax in the targets; wants a teacher.
    distill_ramp: alpha grows linearly from 0 over this many steps (a Duration).
    targets: "image" counts all texts of the same image as right (model_retrieval.py),
      "pair" only the row's own (model_pretrain.py).
  """

  loss: Literal["softmax", "sigmoid"] = "softmax"
  bias: float = -10.0
  queue: int = 0
  distill: float = 0.0
  distill_ramp: schedule.Duration = 0
  targets: Literal["image", "pair"] = "image"

  @nn.compact
  def __call__(self, model, enc, batch, *, teacher=None, train=False):
    if self.loss == "sigmoid" and (self.queue or self.distill):
      raise ValueError('objectives.itc: loss="sigmoid" takes no queue and no distill.')
    if (self.queue or self.distill) and teacher is None and train:
      raise ValueError(
        "objectives.itc: queue and distill want a teacher: set ema_decay, e.g. 0.995."
      )
    ids = batch["image_id"]
    if self.targets == "pair":
      ids = jnp.arange(ids.shape[0], dtype=jnp.int32)
    momentum = bool(self.queue or self.distill) and teacher is not None
    other = teacher.enc if momentum else enc
    scale = model.inverse_temperature()
    images, texts, id_all = self._candidates(other, ids, write=train)

    # Rows are the live embeddings, columns the candidates.
    i2t_BC = scale * enc.zimg @ texts.T
    t2i_BC = scale * enc.ztxt @ images.T
    hits = {
      "i2t_r1": reduce.Mean.of(_hit(i2t_BC, ids, id_all)),
      "t2i_r1": reduce.Mean.of(_hit(t2i_BC, ids, id_all)),
      "temperature": reduce.Mean(1.0 / scale, jnp.float32(1.0)),
    }
    if self.loss == "sigmoid":
      bias = self.param("bias", axes.boxed(nn.initializers.constant(self.bias)), ())
      positive = ids[:, None] == id_all[None, :]
      losses = contrastive.sigmoid(i2t_BC + bias, positive)
      return reduce.Mean.of(losses), hits

    hard = contrastive.positives(ids, id_all)
    i2t_targets = t2i_targets = hard
    if self.distill and momentum:
      alpha = schedule.ramp(enc.step, self.distill, self.distill_ramp)
      frozen = jax.lax.stop_gradient(scale)
      i2t_targets = contrastive.soften(hard, frozen * other.zimg @ texts.T, alpha)
      t2i_targets = contrastive.soften(hard, frozen * other.ztxt @ images.T, alpha)
    i2t = contrastive.cross_entropy(i2t_BC, i2t_targets)
    t2i = contrastive.cross_entropy(t2i_BC, t2i_targets)
    hits |= {"i2t": reduce.Mean.of(i2t), "t2i": reduce.Mean.of(t2i)}
    return reduce.Mean.of((i2t + t2i) / 2), hits

  def _candidates(self, other, ids, *, write):
    """([C, E] images, [C, E] texts, int32 [C] ids): the batch, then the queue."""
    if not self.queue:
      return other.zimg, other.ztxt, ids
    batch, width = other.zimg.shape
    if self.queue < batch:
      raise ValueError(
        f"objectives.itc.queue={self.queue} is smaller than batch_size={batch}."
      )

    def random_rows(stream):
      # Official: unit-norm noise, which candidates are drawn against until overwritten.
      key = jax.random.fold_in(self.make_rng("params"), stream)
      rows = jax.random.normal(key, (self.queue, width))
      return nn.LogicallyPartitioned(contrastive.normalize(rows), ("queue", None))

    empty = lambda: nn.LogicallyPartitioned(
      jnp.full((self.queue,), -1, jnp.int32), ("queue",)
    )
    image_queue = self.variable("memory", "image_queue", random_rows, 0)
    text_queue = self.variable("memory", "text_queue", random_rows, 1)
    id_queue = self.variable("memory", "id_queue", empty)
    ptr = self.variable("memory", "ptr", lambda: jnp.int32(0))
    rings = (image_queue, text_queue, id_queue)
    rows = (other.zimg, other.ztxt, ids)
    if self.targets == "pair":
      # Places in a batch say nothing about an earlier batch: no queued row matches.
      rows = (other.zimg, other.ztxt, jnp.full_like(ids, -1))
    together = tuple(
      jnp.concatenate([row, ring.value]) for row, ring in zip(rows, rings, strict=True)
    )
    if self.targets == "pair":
      together = (*together[:2], jnp.concatenate([ids, id_queue.value]))
    if write and not self.is_initializing() and self.is_mutable_collection("memory"):
      for row, ring in zip(rows, rings, strict=True):
        ring.value = contrastive.enqueue(ring.value, row, ptr.value)
      ptr.value = (ptr.value + batch) % self.queue
    return together


def _hit(logits_BC, ids_B, ids_C):
  """bool [B]: whether the best candidate is one of the same image."""
  return ids_C[jnp.argmax(logits_BC, axis=1)] == ids_B
