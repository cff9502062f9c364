"""Gradients of a global batch by microbatches, exactly, also where rows look at others.

As GradCache (Gao et al. 2021, https://arxiv.org/abs/2101.06983): all embeddings first;
the loss across the batch and its gradient to them; then the encoders again, microbatch
by microbatch, with that gradient and with the objectives that need no other rows. What
is drawn (masked words, negatives) is drawn for the global batch, and a mean is divided
by the weight of the global batch. So M microbatches give the step of one batch. But for
dropout, and dropped paths and patches: those are drawn for each lane, the same in both
passes, and another mesh may make lanes of other rows.

Each lane of a microbatch (`microbatch.py`) adds up its own gradient, so that devices
need not hear of each other's before the last microbatch: one sum over them a step.

Shape letters: B global batch, b = B / M rows of a microbatch, M microbatches, L lanes.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vlp_jax.ops import reduce
from vlp_jax.ops import tree
from vlp_jax.training import microbatch as microbatch_lib
from vlp_jax.training import step as step_lib


@dataclasses.dataclass(frozen=True)
class Stages:
  """A step in pure functions of arrays, which a scan or a host calls in this order.

  Attributes:
    layout: the microbatches.
    reads: the columns of a batch that `across` reads.
    begin: state -> state; the teacher is updated.
    embed: (state, microbatch, number, embedded) -> embedded, with its rows filled in.
    across: (state, {column: [B, …]}, embedded) -> (Across, gradients of the parameters
      so far, [L, …] of each).
    backward: (state, microbatch, number, Across, gradients) -> (gradients, metrics).
    apply: (state, Across, gradients, sums of metrics) -> (state, metrics).
  """

  layout: microbatch_lib.Layout
  reads: tuple[str, ...]
  begin: Callable
  embed: Callable
  across: Callable
  backward: Callable
  apply: Callable

  def empty(self, state: Any, microbatch: Any) -> Any:
    """Shapes of `embedded`, of the whole batch."""
    small = jax.eval_shape(self.embed, state, microbatch, 0, None)
    whole = (self.layout.batch_size,)
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(whole + x.shape[1:], x.dtype), small
    )

  def judged(self, judge: Callable) -> "Stages":
    """The same, whose `apply` is judged as a step is: `judge(step) -> step`."""
    step = judge(lambda state, given: self.apply(state, *given))
    return dataclasses.replace(self, apply=lambda state, *given: step(state, given))

  def told(self, state: Any, microbatch: Any, across: Any, gradients: Any) -> Any:
    """Shapes of the metrics that `backward` gives."""
    return jax.eval_shape(self.backward, state, microbatch, 0, across, gradients)[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Across:
  """What the global batch says to each of its microbatches.

  Attributes:
    gradient: {"zimg", "ztxt"} float32 [B, E], of the loss to the live embeddings.
    drawn: {objective: {name: [B, …]}}.
    shares: {objective: float32 []}, what its sums are multiplied by in the loss.
    loss: float32 []. metrics: {name: Mean}. memory: new.
  """

  gradient: Any
  drawn: Any
  shares: Any
  loss: jax.Array
  metrics: Any
  memory: Any


def make_stages(
  pretrainer: nn.Module,
  tx: optax.GradientTransformation,
  *,
  layout: microbatch_lib.Layout,
  reads: tuple[str, ...],
  seed: int,
  ema_decay: float | None,
  schedule: Callable[[jax.Array], jax.Array],
) -> Stages:
  """The stages of a train step; arguments as of `step.make_train_step`."""
  call = functools.partial(pretrainer.apply, train=True)

  def rngs(state, number):
    # What encoders draw, other for each lane and the same in both passes over it.
    keys = step_lib.keys(seed, state.step)
    return {name: jax.random.fold_in(key, number) for name, key in keys.items()}

  def begin(state):
    if ema_decay is None:
      return state
    return state.replace(ema=tree.ema(state.ema, state.params, decay=ema_decay))

  def embed(state, microbatch, number, embedded):
    def lane(number, rows):
      return call(
        {"params": state.params},
        rows,
        step=state.step,
        teacher_params=state.ema,
        rngs=rngs(state, number),
        method="embed",
      )

    rows = layout.side_by_side(lane, number, microbatch)
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
    return rows if embedded is None else layout.put(embedded, rows, number)

  def across(state, batch, embedded):
    def loss_of(params, live):
      (loss, found), new = call(
        {"params": params, "memory": state.memory},
        batch,
        embedded | dict(live=live),
        step=state.step,
        rngs=step_lib.keys(seed, state.step),
        mutable=["memory"],
        method="across",
      )
      return loss, (loss, *found, new.get("memory", state.memory))

    gradient = jax.grad(loss_of, argnums=(0, 1), has_aux=True)
    (params, live), found = gradient(state.params, embedded["live"])
    loss, metrics, drawn, memory = found
    sums = {name: own["weight"].sum() for name, own in drawn.items()}
    shares = {n: pretrainer.weights[n] / jnp.maximum(w, 1e-9) for n, w in sums.items()}
    across = Across(live, drawn, shares, loss, metrics, memory)
    return across, layout.begin(params)

  def backward(state, microbatch, number, across, gradients):
    def lane(number, rows, towards, drawn):
      def loss_of(params):
        live, metrics = call(
          {"params": params},
          rows,
          drawn,
          step=state.step,
          teacher_params=state.ema,
          rngs=rngs(state, number),
          method="rows",
        )
        loss = sum(jnp.vdot(live[key], slope) for key, slope in towards.items())
        for name, share in across.shares.items():
          loss = loss + share * metrics[name].total
        return loss, metrics

      return jax.grad(loss_of, has_aux=True)(state.params)

    given = layout.take((across.gradient, across.drawn), number)
    more, metrics = layout.side_by_side(lane, number, microbatch, *given)
    gradients = layout.apart(jax.tree.map(jnp.add, gradients, more))
    return gradients, jax.tree.map(lambda x: x.sum(axis=0), metrics)

  def apply(state, across, gradients, told):
    loss = across.loss
    for name in across.shares:
      loss = loss + pretrainer.weights[name] * told[name].value()
    loss = reduce.Mean(loss, jnp.float32(1.0))
    state = state.replace(memory=across.memory)
    metrics = {"loss": loss, **across.metrics, **told}
    gradient = jax.tree.map(lambda x: x.sum(axis=0), gradients)
    return step_lib.update(state, tx, gradient, metrics, schedule)

  return Stages(layout, reads, begin, embed, across, backward, apply)


def make_train_step(stages: Stages) -> Callable:
  """The stages in one function, as `step.make_train_step` makes it of one batch.

  Its batch is whole and on the device; a scan goes over its microbatches.
  """

  def step(state, batch):
    numbers = jnp.arange(stages.layout.count)
    take = functools.partial(stages.layout.take, batch)
    state = stages.begin(state)

    def embed(embedded, number):
      return stages.embed(state, take(number), number, embedded), None

    shapes = stages.empty(state, jax.eval_shape(take, 0))
    embedded = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    embedded, _ = jax.lax.scan(embed, embedded, numbers)
    across, gradients = stages.across(
      state, {key: batch[key] for key in stages.reads}, embedded
    )

    def backward(gradients, number):
      return stages.backward(state, take(number), number, across, gradients)

    gradients, told = jax.lax.scan(backward, gradients, numbers)
    told = jax.tree.map(lambda x: x.sum(axis=0), told)
    return stages.apply(state, across, gradients, told)

  return step
