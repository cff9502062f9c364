"""Optimisers against numpy; who of a real model is decayed or frozen."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import tiny
from vlp_jax.ops import tree
from vlp_jax.training import optim as optim_lib
from vlp_jax.training import step as step_lib

# A few float32 operations a step, over a few steps.
RTOL = 1e-6
# In float32 the bias correction 1 - 0.999**t is off by up to 6e-5 of itself, its root
# by half of that; a step of 0.1 then by 3e-6, and there are a few.
ADAM_RTOL = 1e-5
# Steps of the runs here; their learning rate is constant unless a test says otherwise.
TOTAL = 10


@pytest.fixture(scope="module")
def albef():
  """Shapes of a whole model's parameters, with scanned layers."""
  return step_lib.abstract_params(tiny.albef(), tiny.batch())


def params(seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return {
    "model": {
      "dense": {"kernel": draw(3, 4), "bias": draw(4)},
      "head": {"kernel": draw(4, 2), "bias": draw(2)},
      "temp": np.float32(0.07),
    }
  }


def grads(step):
  return jax.tree.map(lambda x: x * np.float32(0.1 + 0.05 * step), params(100 + step))


def make(given=None, *, total=TOTAL, **fields):
  config = optim_lib.Optim(**(dict(lr=0.1, schedule="constant") | fields))
  return optim_lib.make(config, params() if given is None else given, total_steps=total)


def run(steps=4, **fields):
  """{path: value} after some steps, and the optimizer's state."""
  tx, _ = make(**fields)
  now = params()
  state = tx.init(now)
  for step in range(steps):
    updates, state = tx.update(grads(step), state, now)
    now = optax.apply_updates(now, updates)
  return tree.flatten(now), state


def torch_adamw(*, lr, betas, eps, decay, steps=4):
  """torch.optim.AdamW, of its documentation: decay first, eps beside the root."""
  now, (b1, b2) = tree.flatten(params()), betas
  now = {path: np.asarray(p, np.float64) for path, p in now.items()}
  m = {path: np.zeros_like(p) for path, p in now.items()}
  v = {path: np.zeros_like(p) for path, p in now.items()}
  for step in range(steps):
    rate, t = lr(step), step + 1
    for path, g in tree.flatten(grads(step)).items():
      now[path] = now[path] * (1 - rate * decay(path))
      m[path] = b1 * m[path] + (1 - b1) * g
      v[path] = b2 * v[path] + (1 - b2) * g * g
      root = np.sqrt(v[path]) / np.sqrt(1 - b2**t)
      now[path] = now[path] - rate / (1 - b1**t) * m[path] / (root + eps)
  return now


def assert_close(got, want, *, rtol=RTOL):
  assert got.keys() == want.keys()
  for path in want:
    np.testing.assert_allclose(
      got[path], want[path], rtol=rtol, atol=rtol, err_msg=path
    )


# --- AdamW ---------------------------------------------------------------------


@pytest.mark.parametrize(
  ("b1", "b2", "eps", "decay"),
  [
    (0.9, 0.999, 1e-8, 0.0),
    (0.9, 0.999, 1e-8, 0.5),
    # An eps that matters shows where it stands.
    (0.5, 0.8, 0.3, 0.1),
  ],
)
def test_adamw_is_that_of_torch(b1, b2, eps, decay):
  got, _ = run(b1=b1, b2=b2, eps=eps, weight_decay=decay, bounds=())
  want = torch_adamw(
    lr=lambda step: 0.1,
    betas=(b1, b2),
    eps=eps,
    decay=lambda path: decay * path.endswith("kernel"),
  )
  assert_close(got, want, rtol=ADAM_RTOL)


def test_adamw_follows_the_schedule_as_torch_does():
  fields = dict(lr=0.1, warmup=2, warmup_lr=0.01, end_lr=0.02, schedule="linear")
  got, _ = run(steps=6, weight_decay=0.5, bounds=(), **fields)
  rate = [0.01, 0.055, 0.1, 0.09, 0.08, 0.07]
  want = torch_adamw(
    lr=rate.__getitem__,
    betas=(0.9, 0.999),
    eps=1e-8,
    decay=lambda path: 0.5 * path.endswith("kernel"),
    steps=6,
  )
  assert_close(got, want, rtol=ADAM_RTOL)


def test_decay_is_no_part_of_the_moments():
  _, plain = run(bounds=())
  _, decayed = run(bounds=(), weight_decay=0.5)
  moments = lambda state: {p: x for p, x in tree.flatten(state).items() if "/nu/" in p}
  assert moments(plain)
  assert_close(moments(decayed), moments(plain), rtol=0)


def test_sgd_with_momentum():
  got, _ = run(name="sgd", b1=0.5, bounds=())
  want = {path: np.asarray(p, np.float64) for path, p in tree.flatten(params()).items()}
  trace = dict.fromkeys(want, 0.0)
  for step in range(4):
    for path, g in tree.flatten(grads(step)).items():
      trace[path] = 0.5 * trace[path] + g
      want[path] = want[path] - 0.1 * trace[path]
  assert_close(got, want)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lion", "adafactor"])
def test_every_optimiser_goes_downhill(name):
  tx, _ = make(name=name, lr=0.01, bounds=())
  loss = lambda now: sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(now))
  now, state = params(), tx.init(params())
  for _ in range(10):
    updates, state = tx.update(jax.grad(loss)(now), state, now)
    now = optax.apply_updates(now, updates)
  assert loss(now) < 0.95 * loss(params())


# --- Weight decay --------------------------------------------------------------

DECAYED = {
  *(
    f"model/{tower}/blocks/{layer}/kernel"
    for tower in ("image", "text")
    for layer in (
      "attn/key",
      "attn/out",
      "attn/query",
      "attn/value",
      "mlp/down",
      "mlp/up",
    )
  ),
  *(
    f"model/fusion/blocks/{layer}/kernel"
    for attention in ("attn", "cross")
    for layer in (*(f"{attention}/{x}" for x in ("key", "out", "query", "value")),)
  ),
  "model/fusion/blocks/mlp/down/kernel",
  "model/fusion/blocks/mlp/up/kernel",
  "model/image/patch/kernel",
  "model/image_proj/kernel",
  "model/text/type/embedding",
  "model/text/word/embedding",
  "model/text_proj/kernel",
  "objectives_itm/head/kernel",
  "objectives_mlm/dense/kernel",
}


def decayed(shapes, **fields):
  """Paths that move although their gradient is zero."""
  now = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
  tx, _ = make(shapes, name="sgd", weight_decay=0.5, bounds=(), **fields)
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, now), tx.init(now), now)
  moved = {}
  for path, update in tree.flatten(updates).items():
    # All of a leaf or nothing of it: a scanned layer is no exception.
    (moved[path],) = np.unique(update)
  assert {round(float(x), 6) for x in moved.values()} <= {0.0, -0.05}
  return {path for path, update in moved.items() if update}


def test_which_parameters_are_decayed(albef):
  assert decayed(albef) == DECAYED


def test_scanned_or_not_the_same_are_decayed():
  # Scanned layers have a dimension more, single ones a number in their path.
  shapes = step_lib.abstract_params(tiny.albef(unroll=True), tiny.batch())
  plain = lambda path: re.sub(r"blocks(_|/)\d+", "blocks", path)
  assert {plain(path) for path in decayed(shapes)} == DECAYED


def test_albef_decays_all_but_biases_and_norms(albef):
  # create_two_optimizer of the official code leaves out names by .bias and norms only.
  got = decayed(albef, undecayed=r"(^|/)(bias|scale)$")
  assert got == DECAYED | {
    "model/image/cls",
    "model/image/posemb",
    "model/text/position/embedding",
    "model/temp",
  }


def test_all_parameters_are_decayed_where_the_config_says_so():
  idle = jax.tree.map(np.zeros_like, params())
  tx, _ = make(name="sgd", b1=0.0, weight_decay=0.5, undecayed=None, bounds=())
  updates, _ = tx.update(idle, tx.init(params()), params())
  for path, x in tree.flatten(params()).items():
    np.testing.assert_allclose(tree.flatten(updates)[path], -0.05 * x, rtol=RTOL)


# --- Learning rates ------------------------------------------------------------


def rates(steps, *, total=100, **fields):
  config = optim_lib.Optim(lr=1.0, **fields)
  rate = optim_lib.make_schedule(config, total)
  return [round(float(rate(jnp.int32(step))), 6) for step in steps]


@pytest.mark.parametrize(
  ("fields", "steps", "want"),
  [
    (dict(schedule="constant"), [0, 50, 99], [1, 1, 1]),
    (dict(schedule="constant", warmup=10), [0, 5, 10, 99], [0, 0.5, 1, 1]),
    (dict(schedule="linear"), [0, 50, 100], [1, 0.5, 0]),
    (dict(schedule="linear", end_lr=0.2), [0, 50, 100], [1, 0.6, 0.2]),
    (dict(schedule="linear", warmup=20), [10, 20, 60, 100], [0.5, 1, 0.5, 0]),
    (dict(), [0, 50, 100, 200], [1, 0.5, 0, 0]),
    (dict(end_lr=0.1), [0, 25, 50, 100], [1, 0.868198, 0.55, 0.1]),
    (
      dict(warmup=20, warmup_lr=0.1, end_lr=0.1),
      [0, 10, 20, 60, 100],
      [0.1, 0.55, 1, 0.55, 0.1],
    ),
    # Epochs are counted from the start, warm-up included; not below end_lr.
    (
      dict(schedule="step", warmup=5, decay=0.5, decay_every=10, end_lr=0.2),
      [0, 4, 5, 9, 10, 20, 30, 99],
      [0, 0.8, 1, 1, 0.5, 0.25, 0.2, 0.2],
    ),
  ],
)
def test_schedules(fields, steps, want):
  assert rates(steps, **fields) == want


def test_the_rate_that_is_logged_is_the_rate_that_is_used():
  fields = dict(name="sgd", b1=0.0, warmup=3, schedule="cosine", bounds=())
  tx, rate = make(**fields)
  state = tx.init(params())
  for step in range(6):
    updates, state = tx.update(grads(step), state, params())
    want = jax.tree.map(lambda g, step=step: -rate(step) * g, grads(step))
    assert_close(tree.flatten(updates), tree.flatten(want))


@pytest.mark.parametrize("warmup", [10, 11])
def test_a_warmup_longer_than_the_run(warmup):
  with pytest.raises(ValueError, match=f"{warmup} steps, but the run has 10: shorten"):
    rates([0], total=10, warmup=warmup)


# --- Clipping ------------------------------------------------------------------


def norm(flat):
  return np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in flat.values()))


def sgd_update(gradients, **fields):
  tx, _ = make(name="sgd", b1=0.0, lr=1.0, bounds=(), **fields)
  updates, _ = tx.update(gradients, tx.init(params()), params())
  return {path: -x for path, x in tree.flatten(updates).items()}


def test_a_gradient_is_clipped_by_the_norm_of_all():
  want = tree.flatten(grads(0))
  assert norm(want) > 0.5
  got = sgd_update(grads(0), clip_norm=0.5)
  np.testing.assert_allclose(norm(got), 0.5, rtol=RTOL)
  assert_close(got, {p: x * (0.5 / norm(want)) for p, x in want.items()})


def test_a_small_gradient_is_left_alone():
  assert_close(sgd_update(grads(0), clip_norm=1e3), tree.flatten(grads(0)), rtol=0)


def test_frozen_parameters_have_no_say_in_the_norm():
  huge = grads(0)
  huge["model"]["dense"]["kernel"] = huge["model"]["dense"]["kernel"] * 1e6
  got = sgd_update(huge, clip_norm=0.1, multipliers=(("/dense/kernel", 0.0),))
  frozen = got.pop("model/dense/kernel")
  assert not frozen.any()
  np.testing.assert_allclose(norm(got), 0.1, rtol=RTOL)


# --- Multipliers ---------------------------------------------------------------


def test_multipliers_scale_the_learning_rate_and_the_decay():
  got, _ = run(weight_decay=0.5, multipliers=(("/head/", 0.1),), bounds=())
  plain = dict(betas=(0.9, 0.999), eps=1e-8)
  decay = lambda path: 0.5 * path.endswith("kernel")
  tenth = torch_adamw(lr=lambda _: 0.01, decay=decay, **plain)
  whole = torch_adamw(lr=lambda _: 0.1, decay=decay, **plain)
  want = {path: (tenth if "/head/" in path else whole)[path] for path in whole}
  assert_close(got, want, rtol=ADAM_RTOL)


def test_the_first_pattern_that_matches_wins():
  got = sgd_update(grads(0), multipliers=(("/head/bias", 0.5), ("/head/", 2.0)))
  want = tree.flatten(grads(0))
  factors = {"model/head/bias": 0.5, "model/head/kernel": 2.0}
  assert_close(got, {path: x * factors.get(path, 1.0) for path, x in want.items()})


def test_zero_freezes_and_costs_no_memory():
  fields = dict(weight_decay=0.5, bounds=())
  got, state = run(multipliers=(("/dense/", 0.0),), **fields)
  start, whole = tree.flatten(params()), run(**fields)[0]
  for path in got:
    want = start if "/dense/" in path else whole
    np.testing.assert_array_equal(got[path], want[path], err_msg=path)
  paths = list(tree.flatten(state))
  assert not any("dense" in path for path in paths)
  assert sum("/mu/" in path for path in paths) == 3


def test_frozen_in_a_boxed_model():
  # As `init_state` sees them: with their logical axes around.
  boxed = jax.tree.map(lambda x: nn.LogicallyPartitioned(x, (None,) * x.ndim), params())
  tx, _ = make(multipliers=(("/dense/", 0.0),), weight_decay=0.1)
  state = nn.unbox(tx.init(boxed))
  assert jax.tree.structure(state) == jax.tree.structure(tx.init(params()))


def test_adafactor_of_a_boxed_model_has_moments_without_names():
  boxed = nn.LogicallyPartitioned(jnp.ones((200, 300)), ("embed", "mlp"))
  tx, _ = make({"model": {"kernel": boxed}}, name="adafactor", bounds=())
  state = tx.init({"model": {"kernel": boxed}})
  assert jax.tree.structure(nn.unbox(state)) == jax.tree.structure(state)
  assert (200,) in {x.shape for x in jax.tree.leaves(state)}


def test_patterns_mean_the_paths_of_scanned_layers_too(albef):
  tx, _ = make(albef, multipliers=(("^model/image/", 0.0),))
  paths = list(tree.flatten(jax.eval_shape(tx.init, albef)))
  assert not any("model/image/" in path for path in paths)
  assert any("model/text/blocks/" in path for path in paths)


# --- Bounds --------------------------------------------------------------------


@pytest.mark.parametrize(("sign", "edge"), [(1.0, 1e-3), (-1.0, 0.5)])
def test_the_temperature_stays_in_its_box(sign, edge):
  tx, _ = make(lr=0.2)
  now, state = params(), tx.init(params())
  for _ in range(5):
    push = jax.tree.map(lambda x: jnp.full(x.shape, sign, jnp.float32), now)
    updates, state = tx.update(push, state, now)
    now = optax.apply_updates(now, updates)
    assert 1e-3 - 1e-8 <= now["model"]["temp"] <= 0.5 + 1e-7
  np.testing.assert_allclose(now["model"]["temp"], edge, rtol=1e-5)
  # It comes back at once: the box is around the parameter, not around its moments.
  assert (
    abs(now["model"]["head"]["bias"][0] - params()["model"]["head"]["bias"][0]) > 0.5
  )


def test_inside_of_its_box_nothing_changes():
  fields = dict(lr=1e-3)
  assert_close(run(**fields)[0], run(bounds=(), **fields)[0])


def test_default_bounds_need_no_such_parameter():
  make({"model": {"kernel": jnp.ones(2)}})


# --- Mistakes ------------------------------------------------------------------


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (
      dict(multipliers=(("modle/temp", 0.1),)),
      "optim.multipliers: 'modle/temp' matches no parameter; near are model/temp",
    ),
    (
      dict(multipliers=(("^model/image/block/", 0.1),)),
      "optim.multipliers: '^model/image/block/' matches no parameter; near are model/",
    ),
    (
      dict(bounds=(("^model/tmp$", (0.0, 1.0)),)),
      "optim.bounds: '^model/tmp$' matches no parameter; near are model/temp",
    ),
    (dict(undecayed="biass$"), "optim.undecayed: 'biass$' matches no parameter"),
    # The default of `bounds` covers models that lack it; a multiplier is meant.
    (
      dict(multipliers=((r"^model/log_scale$", 0.1),)),
      "optim.multipliers: '^model/log_scale$' matches no parameter",
    ),
  ],
)
def test_a_pattern_that_matches_nothing(albef, fields, message):
  with pytest.raises(ValueError, match="config: " + re.escape(message)):
    make(albef, **fields)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (
      dict(multipliers=(("model/(", 0.1),)),
      r"optim.multipliers: 'model/(' is no regul",
    ),
    (dict(bounds=(("[", (0.0, 1.0)),)), "optim.bounds: '[' is no regular expression"),
    (dict(undecayed="*bias"), "optim.undecayed: '*bias' is no regular expression"),
    (
      dict(multipliers=(("temp", -1.0),)),
      "optim.multipliers: -1.0 for 'temp': wants 0",
    ),
    (dict(bounds=(("temp", (1.0, 0.0)),)), "optim.bounds: (1.0, 0.0) for 'temp'"),
    (dict(schedule="step"), 'optim.schedule="step" wants optim.decay_every'),
    (dict(lr=-1.0), "optim.lr=-1.0: wants 0 or more"),
    (dict(weight_decay=-0.1), "optim.weight_decay=-0.1: wants 0 or more"),
    (dict(clip_norm=0.0), "optim.clip_norm=0.0: wants more than 0, or None"),
  ],
)
def test_values_that_cannot_be(fields, message):
  with pytest.raises(ValueError, match="config: " + re.escape(message)):
    optim_lib.Optim(**fields)
