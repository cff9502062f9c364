"""Image-text contrast: softmax or sigmoid, momentum queues, soft targets.

CLIP (Radford 2021), SigLIP (Zhai 2023), MoCo-style queues and soft targets of ALBEF
(Li 2021, sections 3.2 and 3.3; official model_pretrain.py and model_retrieval.py).

Shape letters: B batch, E embedding, Q queue, C candidates (B + Q).
"""

import functools
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.nn import axes
from vlp_jax.ops import contrastive
from vlp_jax.ops import reduce
from vlp_jax.ops import ring as ring_lib
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
    backend: "plain" makes the whole matrix of similarities; "ring" makes it tile by
      tile, passing the candidates round the devices (`ops/ring.py`): for large batches.
    tile: of the ring, at most so many rows and columns at once.
  """

  loss: Literal["softmax", "sigmoid"] = "softmax"
  bias: float = -10.0
  queue: int = 0
  distill: float = 0.0
  distill_ramp: schedule.Duration = 0
  targets: Literal["image", "pair"] = "image"
  backend: Literal["plain", "ring"] = "plain"
  tile: int = 4096

  # How it takes part in accumulation (`training/accumulate.py`): of the batch it reads
  # the embeddings and the ids, and of all rows at once.
  accumulates = "embeddings"

  @nn.compact
  def __call__(self, model, enc, batch, *, teacher=None, train=False):
    if self.loss == "sigmoid" and (self.queue or self.distill):
      raise ValueError('objectives.itc: loss="sigmoid" takes no queue and no distill.')
    if self.tile < 1:
      raise ValueError(f"objectives.itc.tile={self.tile}: want 1 or more.")
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
    sections = self._candidates(other, ids, write=train)
    alpha, frozen = None, None
    if self.distill and momentum:
      alpha = schedule.ramp(enc.step, self.distill, self.distill_ramp)
      frozen = jax.lax.stop_gradient(scale)
    bias = None
    if self.loss == "sigmoid":
      bias = self.param("bias", axes.boxed(nn.initializers.constant(self.bias)), ())

    # Rows are the live embeddings, columns the candidates: texts, then images.
    contrast = functools.partial(
      _ring if self.backend == "ring" else _plain, fixed=momentum, tile=self.tile
    )
    texts = [(x, of) for _, x, of in sections]
    images = [(x, of) for x, _, of in sections]
    i2t_soft = t2i_soft = None
    if alpha is not None:
      i2t_soft, t2i_soft = frozen * other.zimg, frozen * other.ztxt
    i2t, i2t_hit = contrast(scale * enc.zimg, ids, texts, i2t_soft, alpha, bias)
    # SigLIP has one loss: the matrix of the other direction is the same one.
    t2i, t2i_hit = contrast(scale * enc.ztxt, ids, images, t2i_soft, alpha, None)
    hits = {
      "i2t_r1": reduce.Mean.of(i2t_hit),
      "t2i_r1": reduce.Mean.of(t2i_hit),
      "temperature": reduce.Mean(1.0 / scale, jnp.float32(1.0)),
    }
    if self.loss == "sigmoid":
      return reduce.Mean.of(i2t), hits
    hits |= {"i2t": reduce.Mean.of(i2t), "t2i": reduce.Mean.of(t2i)}
    return reduce.Mean.of((i2t + t2i) / 2), hits

  def _candidates(self, other, ids, *, write):
    """[([C, E] images, [C, E] texts, int32 [C] ids)] of the batch, and of the queue."""
    own = (other.zimg, other.ztxt, ids)
    if not self.queue:
      return [own]
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
    rows, queued = own, tuple(ring.value for ring in rings)
    if self.targets == "pair":
      # Places in a batch say nothing about an earlier batch: no queued row matches.
      rows = (other.zimg, other.ztxt, jnp.full_like(ids, -1))
    if write and not self.is_initializing() and self.is_mutable_collection("memory"):
      for row, ring in zip(rows, rings, strict=True):
        ring.value = contrastive.enqueue(ring.value, row, ptr.value)
      ptr.value = (ptr.value + batch) % self.queue
    return [own, queued]


def _plain(rows_BE, ids_B, columns, teacher_BE, alpha, bias, *, fixed, tile):
  """(losses float32 [B], hits bool [B]) of scaled rows against columns.

  columns: [([C, E], ids [C])]; a hit: the best candidate is one of the same image.
  """
  del fixed, tile
  all_CE, ids_C = (jnp.concatenate(parts) for parts in zip(*columns, strict=True))
  logits_BC = rows_BE @ all_CE.T
  hit = ids_C[jnp.argmax(logits_BC, axis=1)] == ids_B
  if bias is not None:
    positive = ids_B[:, None] == ids_C[None, :]
    return contrastive.sigmoid(logits_BC + bias, positive), hit
  targets = contrastive.positives(ids_B, ids_C)
  if teacher_BE is not None:
    targets = contrastive.soften(targets, teacher_BE @ all_CE.T, alpha)
  return contrastive.cross_entropy(logits_BC, targets), hit


def _ring(rows_BE, ids_B, columns, teacher_BE, alpha, bias, *, fixed, tile):
  """As `_plain`."""
  ring = ring_lib.Ring(axes.mesh_axes("batch"), tile)
  columns = tuple(columns)
  if bias is not None:
    losses, best = ring_lib.sigmoid(rows_BE, ids_B, columns, bias, ring=ring)
  else:
    losses, best = ring_lib.softmax(
      rows_BE,
      ids_B,
      columns,
      teacher_BE=teacher_BE,
      alpha=0.0 if alpha is None else alpha,
      fixed=fixed,
      ring=ring,
    )
  return losses, best == ids_B
