"""`vlp-jax plan`: a tiny run planned on CPU devices, what it prints, and bad input."""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from vlp_jax import cli
from vlp_jax import config as config_lib
from vlp_jax import config_file
from vlp_jax import plan as plan_lib
from vlp_jax.planning import compiled as compiled_lib
from vlp_jax.planning import hardware
from vlp_jax.planning import make
from vlp_jax.planning import measure
from vlp_jax.planning import result
from vlp_jax.planning import run as run_lib
from vlp_jax.planning import topology as topology_lib

ROOT = pathlib.Path(__file__).parent.parent
CLIP = str(ROOT / "configs" / "clip.py:tiny")
CHIP = hardware.Chip(
  platform="cpu",
  flops=dict(half=2e9, single=1e9, single_high=1e9, double=1e9),
  memory=2.0**30,
  usable=2.0**29,
  bandwidth=1e9,
  link=1e8,
)


def load(*overrides, file=CLIP):
  return config_file.load(file, [f"--config.{each}" for each in overrides])


@pytest.fixture(scope="module")
def planned():
  """(plan, job) of tiny CLIP on eight devices, four of data and two of fsdp."""
  config = load("sharding.mesh.data=4", "sharding.mesh.fsdp=2")
  plan, job, text = make.plan(
    config_lib.run(config),
    run_lib.facts(CLIP, config),
    topology_lib.parse("cpu:8"),
    jax.devices()[:8],
    CHIP,
    file=CLIP,
    overrides=("--config.sharding.mesh.fsdp=2",),
    exact=True,
  )
  assert "ENTRY" in text
  return plan, job


def test_memory_by_kind_is_that_of_the_trees(planned):
  plan, job = planned
  state = job.abstract_state
  shards = {
    "parameters": state.params,
    "optimizer": (state.opt_state, state.step),
    "teacher": state.ema,
    "queues": state.memory,
  }
  for kind, tree in shards.items():
    wanted = 0
    for leaf in jax.tree.leaves(tree):
      parts = math.prod(
        job.mesh.shape[axis]
        for axes in leaf.sharding.spec
        for axis in ((axes,) if isinstance(axes, str) else axes or ())
      )
      wanted += leaf.size * leaf.dtype.itemsize / parts
    assert plan.memory[kind] == wanted, kind
  batch = sum(s.size * s.dtype.itemsize for s in job.batch.values())
  assert plan.memory["batch"] == batch / 8
  assert plan.memory["next batches"] == 2 * batch / 8
  # AdamW's two moments; each of the parameters is split as its moments are.
  assert plan.memory["optimizer"] == pytest.approx(
    2 * plan.memory["parameters"], rel=1e-3
  )
  assert plan.memory["teacher"] == 0
  assert plan.memory["parameters"] < 4 * plan.parameters
  assert sum(plan.memory.values()) == pytest.approx(plan.needed)
  assert plan.memory["activations and temporaries"] > 0


def test_work_and_messages(planned):
  plan, _ = planned
  assert plan.parameters > 10_000
  # Little is made twice without remat, and little of it is left out.
  assert 0.8 < plan.compiled_flops / plan.model_flops < 1.5
  assert {"all-gather", "all-reduce"} <= set(plan.collectives)
  # Gradients of what is not split are added up over all: at least once, in float32.
  reduced = plan.collectives["all-reduce"]["bytes"]
  assert reduced > 0
  times = plan.seconds
  assert times["step"] == max(times["serial"], times["interconnect"])
  assert times["serial"] >= max(times["compute"], times["memory"])
  assert plan.limit == max(("compute", "memory", "interconnect"), key=times.get)


def test_rates_of_the_run(planned):
  plan, _ = planned
  step = plan.seconds["step"]
  rates = plan.rates
  assert rates["examples_per_second_per_chip"] == plan.batch_size / step / 8
  assert rates["days"] == plan.steps * step / 86400
  assert rates["chip_hours"] == pytest.approx(rates["days"] * 24 * 8)
  assert rates["mfu"] == pytest.approx(plan.model_flops / 8 / step / 2e9)


def test_json_has_all_and_is_read_back(planned):
  plan, _ = planned
  content = json.loads(json.dumps(plan.json()))
  assert set(content) == {
    *(field.name for field in dataclasses.fields(result.Plan)),
    "fits",
    "rates",
  }
  assert set(content["memory"]) == set(result.KINDS)
  assert set(content["seconds"]) == {
    "compute",
    "memory",
    "interconnect",
    "serial",
    "step",
  }
  again = result.from_json(content)
  assert again.json() == {**plan.json(), "overrides": list(plan.overrides)} | {
    key: content[key] for key in ("unknown_loops", "advice")
  }


def test_the_printed_plan(planned):
  plan, _ = planned
  text = result.render(plan)
  for line in ("8 devices (data 4, fsdp 2)", "in all", ": fits", "<- the largest"):
    assert line in text
  small = dataclasses.replace(plan, usable=1.0, advice=("more chips",))
  assert "DOES NOT FIT" in result.render(small)
  assert "more chips" in result.render(small)
  refused = dataclasses.replace(
    small, seconds={}, limit=None, compiled_flops=None, collectives={}
  )
  assert "DOES NOT FIT" in result.render(refused)
  table = result.table([plan, refused]).splitlines()
  assert {line.count("|") for line in table} == {len(result.HEADS) + 1}
  assert "too much" in table[-1]


def test_advice_of_what_does_not_fit(planned):
  plan, job = planned
  tight = dataclasses.replace(plan, usable=plan.needed / 2)
  said = "\n".join(make.advice(job, tight))
  for words in ("it lacks", "model.dtype=bfloat16", "model.remat=dots_no_batch"):
    assert words in said


def test_facts_come_from_the_card():
  card = run_lib.facts("configs/albef.py", load(file=str(ROOT / "configs/albef.py")))
  assert card == run_lib.Facts(vocabulary=30522, examples=14_100_000)
  # A tiny config makes its own vocabulary.
  assert run_lib.facts(CLIP, load()).vocabulary == 256
  said = run_lib.facts("mine.py", load(), examples=5, vocabulary=7)
  assert said == run_lib.Facts(7, 5)
  with pytest.raises(ValueError, match=r"mine.py has no card.*--examples=N"):
    run_lib.facts("mine.py", load())
  with pytest.raises(ValueError, match="--examples=0: want 1 or more"):
    run_lib.facts(CLIP, load(), examples=0)


@pytest.mark.parametrize(
  ("batch", "devices", "mesh"),
  [
    (16, 8, None),
    (12, 8, dict(data=4, tensor=2)),
    # Two heads do not split eight ways: what `check_batch` says is the answer.
    (9, 8, None),
  ],
)
def test_a_mesh_for_a_batch_that_does_not_split(batch, devices, mesh):
  albef = str(ROOT / "configs" / "albef.py:tiny")
  run = config_lib.run(load(f"batch_size={batch}", file=albef))
  found, note = run_lib.default_mesh(run, devices)
  assert found == mesh
  if mesh:
    assert "--config.sharding.mesh.tensor=2" in note
  else:
    assert note is None


def test_a_batch_that_does_not_divide_is_refused():
  config = load("batch_size=9")
  with pytest.raises(ValueError, match=r"batch_size=9 is not a multiple of"):
    run_lib.job(config_lib.run(config), run_lib.facts(CLIP, config), jax.devices()[:8])


def test_what_the_tpu_compiler_refuses():
  message = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory"
    " space hbm. Used 35.38G of 15.75G hbm. Exceeded hbm capacity by 19.63G."
  )
  assert compiled_lib.needed_of(message, 7.0) == 35.38 * 2**30
  message = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO"
    " temporaries (37.65G) exceeds available HBM (15.75G)."
  )
  assert compiled_lib.needed_of(message, 7.0) == 37.65 * 2**30 + 7.0
  assert compiled_lib.needed_of("INTERNAL: something else", 7.0) is None


def test_fields_over_those_of_all_towers():
  run = config_lib.run(load("model.image.remat=dots"))
  changed = run_lib.with_fields(run, remat="full", batch_size=4)
  assert changed.model["remat"] == changed.model["image"]["remat"] == "full"
  assert "remat" not in changed.model["text"]
  assert (changed.batch_size, run.model["image"]["remat"]) == (4, "dots")


def test_model_flops_are_of_what_is_computed_once():
  run = config_lib.run(load("model.remat=full", "objectives.lm.pieces=4"))
  once = run_lib.nothing_twice(run)
  assert once.model["remat"] == "none" and once.model["backend"] == "einsum"
  assert once.objectives["lm"]["pieces"] == 1 and run.objectives["lm"]["pieces"] == 4
  assert once.objectives["itc"] == run.objectives["itc"]


def test_measured_beside_predicted(planned):
  plan, _ = planned
  seen = measure.Measured(
    step=3 * plan.seconds["step"],
    steps=2,
    peak=0.5 * (plan.needed - plan.memory["next batches"]),
    loss=1.0,
  )
  assert "3.00 times as long" in measure.render(plan, seen)
  assert "0.50 times as much" in measure.render(plan, seen)
  assert measure.as_json(plan, seen)["memory_ratio"] == 0.5
  unseen = dataclasses.replace(seen, peak=None)
  assert "does not say" in measure.render(plan, unseen)
  assert measure.as_json(plan, unseen)["memory_ratio"] is None
  quick = dataclasses.replace(seen, step=0.5 * plan.seconds["step"])
  assert "stays in a cache" in measure.render(plan, quick)
  assert "stays in a cache" not in measure.render(plan, seen)


def test_what_cannot_be_measured_is_told_before_compiling():
  config = config_lib.run(load("accumulate=2", "accumulate_stream=True"))
  with pytest.raises(ValueError, match="say --config.accumulate_stream=False"):
    measure.check(config, 5)
  with pytest.raises(ValueError, match="--steps=0: want 1 or more"):
    measure.check(config_lib.run(load()), 0)


def test_short_runs_and_single_devices_are_told_as_such(planned):
  one = dataclasses.replace(planned[0], mesh=dict(data=1, fsdp=1, tensor=1), steps=8)
  one = dataclasses.replace(one, seconds=one.seconds | dict(step=0.1))
  text = result.render(one)
  assert "on cpu:8: 1 device\n" in text and "at least 0.8 seconds" in text
  slow = dataclasses.replace(one, seconds=one.seconds | dict(step=90.0))
  assert "at least 12.0 minutes" in result.render(slow)


def test_measuring_runs_the_step(planned):
  seen = measure.run(planned[1], steps=1)
  assert seen.step > 0
  assert 0 < seen.loss < 20


@pytest.mark.parametrize(
  ("argv", "said"),
  [
    ([], "say --config=FILE, or --all"),
    (["--config=configs/albef.py", "--topology=v5e:3x3"], "nearest is v5e:2x4"),
    (["--config=configs/quickstart.py"], "no card that names a slice"),
    (["--all"], "--all wants --out=DIR"),
    (["--all", "nope", "--out=x"], "no such card; there are albef"),
    (["--config=configs/albef.py", "--config.optin.lr=1"], "optin"),
  ],
)
def test_bad_command_lines(argv, said, capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(os, "environ", dict(os.environ))
  with pytest.raises(SystemExit) as error:
    plan_lib.main(argv)
  assert error.value.code == cli.EXIT_USER_ERROR
  assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason='no libtpu: pip install "jax[tpu]", which needs no TPU',
)
def test_a_tpu_slice_that_is_not_here():
  command = [sys.executable, "-m", "vlp_jax.plan", "--json"]
  command += ["--config=configs/clip.py:tiny", "--topology=v5e:4x4"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  plan = result.from_json(json.loads(done.stdout))
  assert plan.fits
  assert plan.devices == 16
  assert "all-reduce" in plan.collectives
  # Scanned layers count as often as they run, and nothing is made twice.
  assert 0.8 < plan.compiled_flops / plan.model_flops < 2.0
  assert "libtpu" in plan.versions
