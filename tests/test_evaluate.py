"""Evaluating a trained run again: what its results and its config are then."""

import json

import pytest

from tests import runs
from vlp_jax import cli
from vlp_jax import evaluate
from vlp_jax import train

SOURCE = {"type": "scenes", "split": "val", "size": 16, "res": 24}
DATA = {"source": SOURCE, "pp": "decode|resize(24)"}


def call(command, workdir, *options):
  """The command, to its end."""
  flags = [o if o.startswith("--") else f"--config.{o}" for o in options]
  if command is evaluate:
    command.main([f"--workdir={workdir}", *flags])
    return
  with pytest.raises(SystemExit) as ended:
    command.main([f"--config={runs.CONFIG}", f"--workdir={workdir}", *flags])
  assert ended.value.code == 0


def results(workdir):
  return json.loads((workdir / "results.json").read_text())


def test_what_is_switched_off_keeps_what_it_found(tmp_path, capsys):
  workdir = tmp_path / "run"
  evals = {name: {"type": "losses", "data": DATA} for name in ("one", "other")}
  call(
    train,
    workdir,
    *runs.ITC,
    "total=2",
    "optim.warmup=1",
    "checkpoint.every=1",
    f"evals={evals}",
  )
  before, config = results(workdir), (workdir / cli.CONFIG_FILE).read_text()
  assert {name: row["step"] for name, row in before.items()} == {"one": 2, "other": 2}

  capsys.readouterr()
  call(evaluate, workdir, "evals.other=None", "--step=1")
  after = results(workdir)
  assert after["other"] == before["other"]
  assert after["one"]["step"] == 1 and after["one"]["loss"] != before["one"]["loss"]
  # The terminal has what was asked for, the page all there is.
  assert "other" not in capsys.readouterr().out
  page = (workdir / "report.html").read_text("utf-8")
  assert "<h2>other</h2>" in page and "an earlier evaluation, of step 2." in page
  # The run is what it was: when it goes on, nothing is switched off.
  assert (workdir / cli.CONFIG_FILE).read_text() == config

  call(evaluate, workdir)
  assert results(workdir) == before
  assert "earlier evaluation" not in (workdir / "report.html").read_text("utf-8")
