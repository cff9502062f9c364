"""Runs over several kinds of data: what a step reads and moves, and wrong configs."""

import dataclasses
import shutil
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import runs
from tests import tiny
from tests.data import pictures
from vlp_jax import batch as batch_lib
from vlp_jax import build
from vlp_jax import clock as clock_lib
from vlp_jax import config as config_lib
from vlp_jax import config_file
from vlp_jax import feeds
from vlp_jax import job as job_lib
from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.objectives import itc
from vlp_jax.objectives import text_mlm
from vlp_jax.ops import tree
from vlp_jax.planning import compiled as compiled_lib
from vlp_jax.planning import cost
from vlp_jax.planning import flops
from vlp_jax.planning import hardware
from vlp_jax.planning import make
from vlp_jax.planning import run as run_lib
from vlp_jax.planning import topology as topology_lib
from vlp_jax.training import sharding
from vlp_jax.training import step as step_lib

FLAVA = f"{runs.ROOT}/configs/flava.py:tiny"


@pytest.fixture(scope="module")
def made():
  """(pretrainer of two kinds, init and step functions, batch of each kind)."""
  objectives = dict(
    itc=itc.Objective(queue=16),
    text_mlm=text_mlm.Objective(tiny.VOCAB, 16, rate=0.3),
  )
  module = pretrainer_lib.Pretrainer(
    tiny.model(depth=1),
    objectives,
    dict(itc=1.0, text_mlm=2.0),
    kinds=dict(text_mlm="texts"),
  )
  pairs = {k: jnp.asarray(x) for k, x in tiny.batch().items()}
  texts = {k: pairs[k] for k in ("text", "text_mask", "image_id")}
  tx = optax.sgd(0.1)
  init = step_lib.make_init(module, tx, ema=True)
  both = {"pairs": pairs, "texts": texts}
  state = jax.jit(lambda key: nn.unbox(init(key, both)))(jax.random.key(0))
  step = jax.jit(
    step_lib.make_train_step(
      module, tx, seed=0, ema_decay=0.9, schedule=optax.constant_schedule(0.1)
    )
  )
  return module, state, step, both


def moved(before, after):
  """Paths of the parts of the model and of objectives that a step has moved."""
  flat = lambda s: tree.flatten(s.params)
  old, new = flat(before), flat(after)
  return {"/".join(p.split("/")[:2]) for p in old if (old[p] != new[p]).any()}


def test_a_step_moves_what_its_kind_of_data_reaches(made):
  _, state, step, both = made
  after, metrics = step(state, {"texts": both["texts"]})
  assert "itc" not in metrics and "text_mlm" in metrics
  parts = moved(state, after)
  assert "model/text" in parts and "objectives_text_mlm/bias" in parts
  assert not {p for p in parts if "image" in p or "temp" in p or "fusion" in p}
  # The state is whole: what this step has nothing to do with is as it was.
  assert jax.tree.structure(after) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, after.memory, state.memory)
  after, metrics = step(after, {"pairs": both["pairs"]})
  assert "text_mlm" not in metrics and "itc" in metrics
  assert int(after.step) == 2
  assert after.memory["objectives_itc"]["ptr"] == len(both["pairs"]["image_id"])


def test_a_step_of_several_kinds_adds_their_losses(made):
  _, state, step, both = made
  parts = [step(state, {kind: both[kind]})[1] for kind in both]
  _, whole = step(state, both)
  assert set(whole) == set(parts[0]) | set(parts[1])
  want = sum(float(p["loss"].value()) for p in parts)
  np.testing.assert_allclose(float(whole["loss"].value()), want, rtol=1e-5)


def test_a_batch_without_kinds_is_of_pairs(made):
  module, state, _, both = made
  variables = {"params": state.params, "memory": state.memory}
  traced = [
    jax.make_jaxpr(lambda b: module.apply(variables, b, rngs=tiny.rngs()))(batch)
    for batch in (both["pairs"], {"pairs": both["pairs"]})
  ]
  assert str(traced[0]) == str(traced[1])


def test_kinds_of_a_batch_are_split_over_devices(made):
  mesh = sharding.make_mesh(sharding.Sharding())
  host = jax.tree.map(np.asarray, made[3])
  put = sharding.put_batch(host, mesh)
  jax.tree.map(np.testing.assert_array_equal, put, host)
  assert put["texts"]["text"].sharding.spec == put["pairs"]["image"].sharding.spec


def check(*options):
  """The feeds of configs/flava.py:tiny with these options."""
  config = config_lib.run(config_file.load(FLAVA, options))
  config_lib.check(config)
  time = clock_lib.of(config, 300)
  made = build.pretrainer(config, vocab=tiny.VOCAB, length=16, time=time)
  sources = dict.fromkeys(("pairs", "images", "texts"), pictures.source(4))
  return feeds.feeds(config, sources, made), feeds.turns(config)


def test_what_the_kinds_of_a_config_are():
  found, turns = check("--config.data.kinds.texts.batch_size=32")
  assert list(found) == ["pairs", "images", "texts"]
  assert {k: f.batch_size for k, f in found.items()} == dict(
    pairs=16, images=16, texts=32
  )
  # Each its own order, though they read one source.
  assert len({f.seed for f in found.values()}) == 3
  assert turns.cycle == ("pairs", "images", "texts") and turns.drawn
  shapes = batch_lib.of(found, types.SimpleNamespace(res=32), 16)
  assert set(shapes["images"]) == {"image", "image_id"}
  assert shapes["texts"]["text"].shape == (32, 16)


def planned(*options):
  """The job of configs/flava.py:tiny with these options, without data."""
  config = config_lib.run(config_file.load(FLAVA, options))
  mesh = sharding.make_mesh(sharding.Sharding(), jax.devices()[:1])
  return job_lib.shapes(config, mesh, vocab=tiny.VOCAB, length=16, examples=300)


def test_what_is_compiled_is_what_steps_read():
  job = planned("--config.data.turns=('pairs','texts','pairs','images+texts')")
  assert {r.kinds: r.share for r in job.readings} == {
    "pairs": 0.5,
    "texts": 0.25,
    "images+texts": 0.25,
  }
  assert {r.kinds: sorted(r.batch) for r in job.readings} == {
    "pairs": ["pairs"],
    "texts": ["texts"],
    "images+texts": ["images", "texts"],
  }
  programs = job_lib.programs(job)
  assert [(p.name, p.times) for p in programs] == [
    ("step pairs", 0.5),
    ("step texts", 0.25),
    ("step images+texts", 0.25),
  ]
  assert [sorted(p.args[1]) for p in programs] == [
    sorted(r.batch) for r in job.readings
  ]


def test_the_work_of_a_run_is_the_mean_of_its_steps():
  of = lambda *turns: flops.of_step(
    planned(f"--config.data.turns={turns}", "--config.data.drawn=False"), tiny.VOCAB
  )
  pairs, texts, images = (
    dataclasses.replace(made, turns=None, batch={kind: made.batch[kind]})
    for made in [planned()]
    for kind in ("pairs", "texts", "images")
  )
  alone = [flops.of_step(job, tiny.VOCAB) for job in (pairs, texts, images)]
  assert of("pairs", "texts", "images") == pytest.approx(sum(alone) / 3)
  assert of("pairs", "texts", "pairs", "images") == pytest.approx(
    (2 * alone[0] + alone[1] + alone[2]) / 4
  )
  # What one step reads of all is more.
  assert of("pairs+texts+images") > max(alone)


def test_a_plan_says_that_it_is_of_several_steps(monkeypatch):
  """Of each step what was compiled for it: their mean, and the most memory."""
  sizes = {"step pairs": 5.0, "step images": 9.0, "step texts": 2.0}

  def compiled(program, job, exact):
    del job, exact
    work = cost.Work(1, {"half": 1e9 * sizes[program.name]}, 1e6)
    work = cost.Cost((work,), (), ())
    rest = dict.fromkeys(
      ("arguments", "donated", "results", "temporaries", "code"), 0.0
    )
    needed = 2**30 * sizes[program.name]
    one = compiled_lib.Compiled(
      program.name, program.times, **rest, needed=needed, cost=work, seconds=1.0
    )
    return one, ""

  monkeypatch.setattr(compiled_lib, "compile", compiled)
  given = config_file.load(FLAVA)
  plan, job, _ = make.plan(
    config_lib.run(given),
    run_lib.facts(FLAVA, given),
    topology_lib.parse("cpu:1"),
    jax.devices()[:1],
    hardware.CHIPS["h100"],
    file=FLAVA,
  )
  assert plan.note == (
    "steps read pairs, images, texts in turns: memory is of the largest, the rest"
    " their mean"
  )
  assert plan.compiled_flops == pytest.approx(1e9 * (5 + 9 + 2) / 3)
  held = max(compiled_lib.held(r.batch) for r in job.readings)
  assert plan.needed == 9 * 2**30 + 2 * held


@pytest.mark.parametrize(
  "options, message",
  [
    (["objectives.mim.kind=imagse"], r"mim\.kind='imagse': .*did you mean 'images'"),
    (["objectives.mim.kind=texts"], r"mim reads image, but its data, .* holds texts"),
    (["objectives.mmm.kind=images"], r"mmm reads image and text, .* holds images"),
    (["objectives.mim=None"], r"data\.kinds\.images: no objective is for it"),
    (["data.turns=('pairs','text','images')"], r"names 'text'; did you mean 'texts'"),
    (["data.turns=('pairs','texts')"], r"never reads 'images'"),
    (
      ["data.kinds.images.hold='texts'"],
      r"kinds\.images\.hold: .*did you mean 'holds'",
    ),
    (["data.kinds.images.holds='image'"], r"kinds\.images\.holds: wrong value"),
    (["data.kinds.texts.source.type=tabel"], r"did you mean 'table'"),
    (
      [
        "data.kinds={}",
        "objectives.mim=None",
        "objectives.text_mlm=None",
        "data.turns=('pairs','texts')",
      ],
      r"there is one kind of data",
    ),
    (["data.holds=images"], r"itc reads image and text, but its data, kind 'pairs'"),
  ],
)
def test_wrong_kinds(options, message):
  with pytest.raises(ValueError, match=message):
    check(*(f"--config.{option}" for option in options))


def test_a_codebook_is_frozen(tmp_path):
  config = config_file.load(FLAVA, ["--config.optim.multipliers=()"])
  with pytest.raises(ValueError, match=r"model\.codebook makes targets, and is not"):
    job_lib.make(config_lib.run(config), tmp_path)


@pytest.mark.slow
def test_goes_on_bit_by_bit(tmp_path):
  """From a checkpoint between the turns of the kinds, as if it had not stopped."""
  options = ["total=7", "log.every=1", "checkpoint.every=2", "checkpoint.keep=9"]
  options = [f"--config.{option}" for option in options]
  workdir = tmp_path / "run"
  runs.finish(runs.start(workdir, *options, config=FLAVA), workdir)
  state, lines = runs.state(workdir), runs.metrics(workdir)
  assert len({"itc" in line for line in lines}) == 2
  for late in (6, 7):
    shutil.rmtree(workdir / "checkpoints" / str(late))
  assert "from step 4" in runs.finish(
    runs.start(workdir, *options, config=FLAVA), workdir
  )
  got = runs.state(workdir)
  assert got.keys() == state.keys()
  assert not [p for p in state if got[p].tobytes() != state[p].tobytes()]
  assert runs.metrics(workdir) == lines
