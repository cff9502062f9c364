"""One objective a step: drawn by shares from (seed, step); the others cost nothing."""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import test_uniter
from tests import tiny
from tests.configs import test_all
from vlp_jax import build
from vlp_jax import clock as clock_lib
from vlp_jax import config as config_lib
from vlp_jax import config_file
from vlp_jax.ops import reduce
from vlp_jax.training import sharding as sharding_lib
from vlp_jax.training import step as step_lib

SHARES = types.MappingProxyType(dict(sine=3.0, cosine=1.0))
BATCH = 16


class Waves:
  """A pretrainer of two objectives, each with a parameter of its own, and a third."""

  shares = SHARES

  def init(self, rngs, batch):
    names = ("sine", "cosine", "always")
    params = {name: jnp.float32(0.5) for name in names}
    return {"params": params, "memory": {"seen": jnp.int32(0)}}

  def apply(
    self, variables, batch, *, step, teacher_params, train, rngs, mutable, drawn
  ):
    params, one = variables["params"], jnp.float32(1.0)
    losses = {"always": params["always"] * batch["x"].mean()}
    if drawn == "sine":
      losses["sine"] = jnp.sin(params["sine"])
    if drawn == "cosine":
      losses["cosine"] = jnp.cos(params["cosine"])
    metrics = {name: reduce.Mean(loss, one) for name, loss in losses.items()}
    memory = {"seen": variables["memory"]["seen"] + 1}
    return (reduce.Mean(sum(losses.values()), one), metrics), {"memory": memory}


def train_step(seed=0):
  schedule = lambda step: 1e-3
  fixed = dict(seed=seed, ema_decay=None, schedule=schedule)
  return step_lib.make_train_step(Waves(), optax.sgd(1e-3), **fixed)


def run(steps, *, seed=0, devices=1):
  """[(names with a value, parameters)] of each step."""
  sharding = sharding_lib.Sharding()
  mesh = sharding_lib.make_mesh(sharding, jax.devices()[:devices])
  init = step_lib.make_init(Waves(), optax.sgd(1e-3), ema=False)
  batch = dict(x=np.ones(BATCH, np.float32))
  state, seen = init(jax.random.key(0), batch), []
  with sharding_lib.use(mesh, sharding):
    step = jax.jit(train_step(seed))
    for _ in range(steps):
      state, metrics = step(state, sharding_lib.put_batch(batch, mesh))
      assert set(metrics) >= {"sine", "cosine", "always", "loss", "grad_norm"}
      seen.append((set(reduce.counted(metrics)), jax.device_get(state.params)))
  assert int(state.memory["seen"]) == steps
  return seen


def test_each_step_has_one_and_moves_only_its_own():
  seen, before = run(60), dict.fromkeys(("sine", "cosine", "always"), 0.5)
  counts = collections.Counter()
  for names, params in seen:
    (drawn,) = names & set(SHARES)
    (other,) = set(SHARES) - {drawn}
    assert "always" in names and other not in names
    assert params[other] == before[other] and params[drawn] != before[drawn]
    assert params["always"] != before["always"]
    counts[drawn], before = counts[drawn] + 1, params
  # Three of four, within three standard deviations.
  assert abs(counts["sine"] - 45) < 3 * (60 * 0.75 * 0.25) ** 0.5


def test_what_is_drawn_is_of_seed_and_step_on_any_mesh():
  names = [[n for n, _ in run(12, **of)] for of in ({}, dict(devices=8), dict(seed=1))]
  assert names[0] == names[1] != names[2]


def test_what_is_not_drawn_is_not_computed():
  init = step_lib.make_init(Waves(), optax.sgd(1e-3), ema=False)
  batch = dict(x=jnp.ones(BATCH))
  jaxpr = jax.make_jaxpr(train_step())(init(jax.random.key(0), batch), batch)
  (switch,) = [e for e in jaxpr.eqns if e.primitive.name == "cond"]
  sine, cosine = (str(branch) for branch in switch.params["branches"])
  # The derivative of each is the other: which is multiplied tells them apart.
  assert "neg" not in sine and "neg" in cosine
  outside = [e.primitive.name for e in jaxpr.eqns if e is not switch]
  assert not {"sin", "cos"} & set(outside)


def test_a_pretrainer_leaves_out_what_is_not_drawn():
  module = test_uniter.pretrainer().clone(shares=dict(mlm=2.0, mrfr=1.0, mrc=1.0))
  batch = {key: jnp.asarray(value) for key, value in test_uniter.batch().items()}
  rngs = {"params": jax.random.key(0), **tiny.rngs()}
  variables = jax.eval_shape(lambda b: module.init(rngs, b), batch)

  def names(drawn):
    run = lambda v: module.apply(v, batch, rngs=tiny.rngs(), drawn=drawn)
    _, metrics = jax.eval_shape(run, variables)
    return {name.partition("/")[0] for name in metrics}

  # The matching has no share, so it is in every step.
  assert names("mlm") == {"mlm", "itm"}
  assert names(None) == {"mlm", "itm", "mrfr", "mrc"}


def test_shares_of_a_config(monkeypatch):
  monkeypatch.chdir(test_all.ROOT)

  def build_it(*overrides):
    config = config_lib.run(config_file.load("configs/uniter.py:tiny", overrides))
    config_lib.check(config)
    vocab, length = test_all.stand_in(config)
    time = clock_lib.of(config, 100)
    return build.pretrainer(config, vocab=vocab, length=length, time=time)

  assert build_it().shares == dict(itm=3.0, mlm=4.0, mrfr=2.0, mrc=2.0)
  with pytest.raises(ValueError, match=r"objectives.mlm.share=0.0: want more than 0"):
    build_it("--config.objectives.mlm.share=0.0")
  with pytest.raises(ValueError, match=r"objectives.mlm.share: wrong type: got 'x'"):
    build_it("--config.objectives.mlm.share=x")
