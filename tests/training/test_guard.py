"""Steps that are not to be believed: what is left out, remembered, and told."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlp_jax.ops import reduce
from vlp_jax.training import guard as guard_lib
from vlp_jax.training import step as step_lib

Guard = guard_lib.Guard
LR = 0.5


class Line:
  """The smallest pretrainer: loss = sum((a - x)^2) / 2 and a counter."""

  shares = types.MappingProxyType({})

  def init(self, rngs, batch):
    return {"params": {"a": jnp.ones(3)}, "memory": {"seen": jnp.int32(0)}}

  def apply(self, variables, batch, *, step, teacher_params, train, rngs, mutable):
    loss = 0.5 * jnp.sum(jnp.square(variables["params"]["a"] - batch["x"]))
    memory = {"seen": variables["memory"]["seen"] + 1}
    return (reduce.Mean(loss, jnp.float32(1.0)), {}), {"memory": memory}


# What tests compile without (see conftest.py) decides whether products and sums are
# rounded apart, which is another matter from program to program.
AS_IN_A_RUN = {"xla_cpu_use_fusion_emitters": True}
if jax.__version_info__ >= (0, 11):
  AS_IN_A_RUN = None


def run(guard, batches):
  """(states, metrics) of Adam on `Line`; batches are the values of x."""
  schedule = lambda step: LR / (1 + step)
  tx = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(schedule))
  state = step_lib.make_init(Line(), tx, ema=True)(jax.random.key(0), None)
  step = step_lib.make_train_step(Line(), tx, seed=0, ema_decay=0.9, schedule=schedule)
  step = jax.jit(
    guard_lib.guarded(step, guard, schedule=schedule), compiler_options=AS_IN_A_RUN
  )
  states, told = [state], []
  for x in batches:
    state, metrics = step(state, {"x": jnp.full(3, x)})
    states.append(state)
    told.append(guard_lib.floats(metrics))
  return states, told


def arrays(state):
  return jax.tree.leaves((state.params, state.opt_state, state.ema, state.memory))


def assert_same(got, want):
  for a, b in zip(arrays(got), arrays(want), strict=True):
    np.testing.assert_array_equal(a, b)


# --- On the device -----------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_skipped_update_leaves_all_as_it_was(bad):
  """1e30: the loss is finite in nothing but its sign; its gradient's norm is not."""
  states, told = run(Guard(nonfinite="skip"), [0.5, bad, 0.25])
  assert_same(states[2], states[1])
  assert int(states[2].step) == 2
  # The updates are those of a run that never saw it, at the same learning rates.
  clean, clean_told = run(Guard(nonfinite="skip"), [0.5, 0.25])
  assert_same(states[3], clean[2])
  assert [t[guard_lib.NONFINITE] for t in told] == [0, 1, 1]
  assert [t[guard_lib.LAST] for t in told] == [0, 2, 2]
  assert told[2]["learning_rate"] == clean_told[1]["learning_rate"]
  assert all(np.isfinite(x).all() for x in arrays(states[3]))


def test_without_a_policy_the_step_is_the_same_function():
  step = lambda state, batch: None
  assert guard_lib.guarded(step, Guard(), schedule=None) is step
  assert guard_lib.guarded(step, Guard(spike="stop"), schedule=None) is not step


def test_a_guard_changes_no_number_of_a_good_run():
  batches = np.random.default_rng(0).normal(size=8)
  plain, plain_told = run(Guard(), batches)
  kept, kept_told = run(Guard(nonfinite="skip", spike="skip", window=9), batches)
  assert_same(kept[-1], plain[-1])
  assert [t["loss"] for t in kept_told] == [t["loss"] for t in plain_told]


def record(guard, losses, norms=None):
  """(taken of each, the last record) of `judge` alone."""
  judge = jax.jit(
    lambda r, loss, norm, step: guard_lib.judge(guard, r, loss, norm, step)
  )
  state, taken = guard_lib.fresh(), []
  norms = np.ones(len(losses)) if norms is None else norms
  for i, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
    fine, state = judge(state, jnp.float32(loss), jnp.float32(norm), jnp.int32(i + 1))
    taken.append(bool(fine))
  return taken, state


def test_the_means_are_plain_until_the_window_is_full():
  rng = np.random.default_rng(0)
  losses, norms = rng.normal(3.0, 0.5, size=20), rng.uniform(0.5, 2.0, size=20)
  guard = Guard(spike="skip", window=20, loss_sigmas=1e6, norm_factor=1e6)
  taken, got = record(guard, losses, norms)
  assert all(taken) and int(got.seen) == 20
  np.testing.assert_allclose(got.loss, losses.mean(), rtol=1e-5)
  np.testing.assert_allclose(got.variance, losses.var(), rtol=1e-5)
  np.testing.assert_allclose(got.log_norm, np.log(norms).mean(), atol=1e-6)


def test_the_means_forget():
  guard = Guard(spike="skip", window=4, loss_sigmas=1e6, norm_factor=1e6)
  losses = [0.9, 1.1, 0.9, 1.1] + [2.0] * 3
  taken, got = record(guard, losses)
  assert all(taken)
  mean, var = 1.0, 0.01
  for loss in losses[4:]:
    mean, var = mean + (loss - mean) / 4, 0.75 * (var + (loss - mean) ** 2 / 4)
  np.testing.assert_allclose([got.loss, got.variance], [mean, var], rtol=1e-5)


def test_a_leap_of_the_loss_is_a_spike():
  rng = np.random.default_rng(0)
  losses = list(rng.normal(3.0, 0.1, size=60))
  losses[50] = 9.0
  guard = Guard(spike="skip", window=20, loss_sigmas=6.0, norm_factor=None)
  taken, got = record(guard, losses)
  assert [i for i, fine in enumerate(taken) if not fine] == [50]
  assert int(got.spikes) == 1 and int(got.last) == 51 and int(got.nonfinite) == 0
  assert int(got.seen) == 59
  # A fall is none.
  losses[50] = -9.0
  assert all(record(guard, losses)[0])


def test_nothing_is_a_spike_before_there_is_a_window():
  losses = [1.0, 1.0, 1.0, 50.0]
  assert all(record(Guard(spike="skip", window=4), losses)[0])
  assert record(Guard(spike="skip", window=3), losses)[0] == [True] * 3 + [False]


def test_a_leap_of_the_gradient_is_a_spike():
  norms = [1.0, 2.0, 0.5, 1.0, 9.9, 10.2, 1.0]
  guard = Guard(spike="skip", window=4, loss_sigmas=None, norm_factor=10.0)
  # 9.9 is not, and moves the mean to 1.77: 10.2 is not 10 times that.
  assert all(record(guard, np.ones(7), norms)[0])
  norms[4] = 10.1
  taken, got = record(guard, np.ones(7), norms)
  assert taken == [True] * 4 + [False, False, True]
  assert int(got.spikes) == 2 and int(got.last) == 6


def test_what_is_not_finite_moves_no_mean():
  guard = Guard(nonfinite="skip", spike="skip", window=2)
  taken, got = record(guard, [1.0, np.nan, 1.0, np.inf, 1.0], [1, 1, np.nan, 1, 1])
  assert taken == [True, False, False, False, True]
  assert (int(got.nonfinite), int(got.spikes), int(got.seen)) == (3, 0, 2)
  assert float(got.loss) == 1.0 and float(got.variance) == 0.0


# --- On the host -------------------------------------------------------------------


def watch(**fields):
  return guard_lib.Watch(Guard(**fields), guard_lib.fresh())


def values(*, nonfinite=0, spikes=0, last=0, loss=1.0):
  counts = {guard_lib.NONFINITE: nonfinite, guard_lib.SPIKES: spikes}
  return {"loss": loss} | counts | {guard_lib.LAST: last}


def kept():
  return "The last good checkpoint is kept: step 6."


def test_by_default_what_is_not_finite_stops():
  with pytest.raises(
    FloatingPointError,
    match=r"step 8: not finite: loss, itc\. The last good .* step 6\. Lower optim.lr",
  ):
    watch().look({"loss": np.nan, "itm": 1.0, "itc": np.inf}, 8, kept)
  assert watch().look({"loss": 1.0}, 8, kept) is None


def test_skipping_is_told_and_bounded(caplog):
  looks = watch(nonfinite="skip", most=2)
  assert looks.look(values(nonfinite=1, last=8, loss=np.nan), 8, kept) is None
  assert "step 8: the loss or its gradient is not finite" in caplog.text
  assert "1 updates left out of at most 2" in caplog.text
  assert looks.look(values(nonfinite=1, last=8), 9, kept) is None
  assert looks.look(values(nonfinite=2, last=11), 12, kept) is None
  with pytest.raises(
    FloatingPointError, match=r"step 15: 3 updates left out, and guard.most=2. The last"
  ):
    looks.look(values(nonfinite=3, last=15), 16, kept)


def test_a_metric_that_is_not_finite_while_the_loss_is():
  with pytest.raises(FloatingPointError, match="step 9: not finite: itc/accuracy"):
    watch(nonfinite="skip").look(values() | {"itc/accuracy": np.nan}, 9, kept)


def test_a_policy_to_stop_names_the_step():
  with pytest.raises(FloatingPointError, match="step 7: bad, .*to stop. The last good"):
    watch(spike="stop").look(values(spikes=1, last=7), 10, kept)
  # Beside another policy: what was not finite was left out, but it is to stop the run.
  with pytest.raises(FloatingPointError, match="step 7: bad"):
    watch(spike="skip").look(values(nonfinite=1, last=7), 10, kept)


def test_going_back_is_told_where_to_and_bounded():
  looks = watch(spike="roll_back", most=1)
  assert looks.look(values(), 4, kept) is None
  assert looks.look(values(spikes=2, last=7), 10, kept) == 7
  assert looks.rolled_back == 1
  looks.goes_on_from(guard_lib.fresh())
  with pytest.raises(
    FloatingPointError, match="step 7: 2 times back, and guard.most=1"
  ):
    looks.look(values(spikes=1, last=7), 10, kept)


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    (dict(most=0), "guard.most=0: wants 1 or more"),
    (dict(window=1), "guard.window=1: wants 2 or more"),
    (dict(loss_sigmas=0.0), "guard.loss_sigmas=0.0: wants more than 0, or None"),
    (dict(norm_factor=1.0), "guard.norm_factor=1.0: wants more than 1, or None"),
    (
      dict(spike="skip", loss_sigmas=None, norm_factor=None),
      "guard.spike='skip' wants guard.loss_sigmas or guard.norm_factor",
    ),
  ],
)
def test_wrong_fields(fields, words):
  with pytest.raises(ValueError, match=f"config: {words}"):
    Guard(**fields)
