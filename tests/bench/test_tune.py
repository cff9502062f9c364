"""What a setting gives: the changes, beside a config's own step."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from vlp_jax import cli
from vlp_jax.bench import program
from vlp_jax.bench import tune

ROOT = pathlib.Path(__file__).parents[2]
SMALL = (
  f"--config={ROOT}/configs/clip.py:tiny",
  "--config.model.image.depth=1",
  "--config.model.text.depth=1",
  "--batch_size=8",
)


def test_a_change_is_of_the_config_the_compiler_or_the_state():
  made = tune.parse("--config.model.remat='full' xla_some_flag=true xla_number=3")
  assert made.overrides == ("--config.model.remat='full'",)
  assert made.options == {"xla_some_flag": True, "xla_number": 3} and made.donate
  assert not tune.parse("donate=False").donate


@pytest.mark.parametrize(
  ("said", "message"),
  [
    ("remat", "'remat' is not NAME=VALUE"),
    ("xla_flag=", "'xla_flag=' is not NAME=VALUE"),
    ("model.remat=full", "is neither --config.a.b=value, nor"),
    ("donate=0", "is neither"),
    ("", "changes nothing"),
    ("donate=True", "changes nothing"),
  ],
)
def test_wrong_changes(said, message):
  with pytest.raises(ValueError, match=r"bench tune: --try=") as error:
    tune.parse(said)
  assert message in str(error.value)


def fails(capsys, *argv):
  with pytest.raises(SystemExit) as error:
    tune.main(argv)
  assert error.value.code == cli.EXIT_USER_ERROR
  return capsys.readouterr().err


def test_what_the_user_said_wrong_is_told_and_nothing_is_run(capsys, monkeypatch):
  assert "--repeats=0" in fails(capsys, *SMALL, "--repeats=0")
  assert "did you mean" in fails(capsys, *SMALL, "--config.modle.remat=full")
  monkeypatch.setattr(program, "lower", None)  # Nothing may come that far.
  tried = ("--try=donate=False", "--try=--config.model.remat='ful'")
  assert "model.remat" in fails(capsys, *SMALL, *tried)


def test_the_usual_changes_are_those_a_config_has_fields_for():
  albef = program.load(f"{ROOT}/configs/albef.py:tiny", batch_size=8)
  names = [change.name for change in tune.usual(albef)]
  assert len(names) == len(tune.CHANGES)
  assert any("max_masked=4" in name for name in names)
  clip = program.load(SMALL[0].partition("=")[2], batch_size=8)
  names = [change.name for change in tune.usual(clip)]
  assert len(names) == len(tune.CHANGES) - 1
  assert not [name for name in names if "mlm" in name]


def test_changes_beside_the_own_step(tmp_path, capsys):
  out = tmp_path / "tune.json"
  changes = (
    "donate=False",
    "--config.batch_size=16",
    "xla_no_such_option=1",
  )
  argv = [*SMALL[:3], "--config.batch_size=8"]
  tried = [f"--try={change}" for change in changes]
  tune.main([*argv, *tried, "--repeats=1", f"--out={out}"])
  found = json.loads(out.read_text())
  assert json.loads(capsys.readouterr().out) == found
  assert list(found["changes"]) == list(changes)
  kept = found["changes"]["donate=False"]
  # At least the parameters are there twice.
  job = program.load(SMALL[0].partition("=")[2], SMALL[1:3], batch_size=8)
  more = kept["memory_bytes"] - found["own"]["memory_bytes"]
  assert more > size(job.abstract_state.params)
  larger = found["changes"]["--config.batch_size=16"]
  assert larger["of_own"]["memory"] > 1
  for each in (kept, larger):
    assert each["compile_seconds"] > 0
    own, other = each["step_ms"]["own"], each["step_ms"]["other"]
    rows = 2 if each is larger else 1
    assert each["of_own"]["time"] == pytest.approx(min(other) / min(own) / rows)
  assert "xla_no_such_option" in found["changes"]["xla_no_such_option=1"]["error"]


def size(trees):
  import jax

  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trees))


def test_changes_for_hardware_that_is_not_here(tmp_path):
  out = tmp_path / "tune.json"
  tried = ["--try=--config.model.remat='full'", "--try=donate=False"]
  argv = [SMALL[0], "--batch_size=512", *tried, "--topology=cpu:2", f"--out={out}"]
  done = subprocess.run(
    [sys.executable, "-m", "vlp_jax.bench", "tune", *argv],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(out.read_text())
  assert found["topology"] == "cpu:2" and found["own"]["step_ms"] > 0
  remat, kept = found["changes"].values()
  assert remat["of_own"]["memory"] < 1 < kept["of_own"]["memory"]
  assert remat["of_own"]["time"] > 0
