"""`fit.search`: what is compiled, what is left out, and what it ends with."""

import dataclasses
import json
import pathlib
import types

import jax
import pytest

from vlp_jax import cli
from vlp_jax import config as config_lib
from vlp_jax import config_file
from vlp_jax import plan as plan_lib
from vlp_jax.planning import fit
from vlp_jax.planning import kept
from vlp_jax.planning import result
from vlp_jax.planning import run as run_lib

CLIP = str(pathlib.Path(__file__).parents[2] / "configs" / "clip.py:tiny")


def load(*overrides):
  return config_lib.run(
    config_file.load(CLIP, [f"--config.{each}" for each in overrides])
  )


def search(keeps, *, extra=1.0, state=1.0, slow=None, late=None, batch_size=64, **how):
  """What a search finds, and the (fsdp, tensor, remat, accumulate) that it compiles.

  Args:
    keeps: {remat: GiB of a device}. extra: that a step takes beside, in whole batches.
    state: GiB, or {fsdp: GiB}. slow: (fsdp, remat, accumulate) -> seconds.
    late: after so many compilations.
  """
  asked = []
  slow = slow or (lambda fsdp, remat, accumulate: accumulate + fit.REMAT.index(remat))
  states = state if isinstance(state, dict) else {}

  def state_of(run):
    mesh = run.sharding["mesh"]
    if run.accumulate > how.get("most", 1e9):
      raise ValueError("config: accumulate: neighbours have to stay together.")
    return states.get(mesh["fsdp"], 1.0 if states else state) * result.GIB

  def plan_of(choice):
    mesh = dict(choice.mesh)
    asked.append((mesh["fsdp"], mesh["tensor"], choice.remat, choice.accumulate))
    if how.get("stops") == len(asked):
      raise KeyboardInterrupt
    rest = (keeps[choice.remat] + extra) / choice.accumulate
    return dataclasses.replace(
      BARE,
      needed=state_of(choice.of(load())) + rest * result.GIB,
      seconds=BARE.seconds
      | dict(step=float(slow(mesh["fsdp"], choice.remat, choice.accumulate))),
      overrides=choice.overrides,
    )

  said = []
  found = fit.search(
    load(f"batch_size={batch_size}", "model.text.num_heads=2"),
    8,
    state_of=state_of,
    kept_of=lambda run: 8 * result.GIB * keeps[run.model["remat"]],
    plan_of=plan_of,
    usable=10 * result.GIB,
    tell=said.append,
    late=(lambda: len(asked) >= late) if late else lambda: False,
  )
  return found, asked, said


def keeps(*sizes):
  return dict(zip(fit.REMAT, sizes, strict=True))


@pytest.mark.parametrize("least", fit.REMAT)
def test_a_policy_that_keeps_too_much_is_not_compiled(least):
  number = fit.REMAT.index(least)
  found, asked, said = search(keeps(*[50.0] * number, *[5.0] * (4 - number)))
  assert asked == [(8, 1, least, 1), (1, 1, least, 1)]
  assert found.best[0].remat == least and found.ended is None
  assert found.compiled[found.best[0]] == found.best[1]
  assert sum(
    "remat none: at least 51.0 GiB, not compiled" in line for line in said
  ) == (2 if number else 0)
  assert found.best[0].overrides == (
    "--config.sharding.mesh.data=1",
    "--config.sharding.mesh.fsdp=8",
    "--config.sharding.mesh.tensor=1",
    f"--config.model.remat={least}",
  )


def test_of_meshes_the_fastest():
  found, asked, _ = search(keeps(5, 4, 3, 2), slow=lambda fsdp, *rest: fsdp)
  assert asked == [(8, 1, "none", 1), (1, 1, "none", 1)]
  assert dict(found.best[0].mesh)["data"] == 8


def test_what_was_compiled_says_what_does_not_fit():
  # 7.2 GiB beside what is kept, which nobody knows before.
  found, asked, _ = search(keeps(4.5, 4.4, 3.0, 1.0), extra=7.2)
  # None takes 12.7 with the state: dots keeps hardly less. On the other mesh it is
  # known of all but full.
  assert asked == [
    (8, 1, "none", 1),
    (8, 1, "dots_no_batch", 1),
    (8, 1, "full", 1),
    (1, 1, "full", 1),
  ]
  assert found.best[1].needed == pytest.approx(9.2 * result.GIB)


def test_nothing_is_compiled_where_the_state_alone_is_too_large():
  found, asked, said = search(keeps(4, 3, 2, 1), state={1: 11.0, 8: 2.0})
  assert asked == [(8, 1, "none", 1)]
  assert "data 8: the state alone takes 11.0 GiB" in said
  found, asked, _ = search(keeps(4, 3, 2, 1), state=11.0)
  assert (found.best, asked) == (None, [])


def test_what_an_axis_splits_of_the_state_is_taken_off():
  # 7 whole and 1 split: what fits split is known not to fit whole, and the reverse
  # is tried.
  found, asked, _ = search(keeps(4, 3, 2.9, 2.8), state={1: 7.0, 8: 1.0}, extra=1.5)
  assert asked == [(8, 1, "none", 1)]
  assert found.best[0].remat == "none"


def test_a_wider_tensor_axis_where_nothing_else_fits():
  _, asked, _ = search(keeps(4, 3, 2, 1), state={1: 11.0, 8: 11.0, 4: 2.0})
  assert asked[0] == (4, 2, "none", 1) and {key[1] for key in asked} == {2}


def test_microbatches_where_remat_does_not_do():
  def slow(fsdp, remat, accumulate):
    return {"none": 9, "dots": 5, "dots_no_batch": 7, "full": 8}[remat] - fsdp / 8

  found, asked, _ = search(keeps(80, 40, 30, 20), extra=4.0, slow=slow)
  # Of none 80 / 8 and the state do not fit 10: eight would have to become more than the
  # rows of a device. Of full 2 are known not to do, and 4 do.
  assert asked == [
    (8, 1, "dots", 8),
    (8, 1, "dots_no_batch", 4),
    (8, 1, "full", 4),
    (1, 1, "dots", 8),
  ]
  assert found.best[0].overrides[-2:] == (
    "--config.model.remat=dots",
    "--config.accumulate=8",
  )
  assert found.best[0].mesh[1] == ("fsdp", 8)


def test_numbers_of_microbatches_are_those_that_split_the_rows():
  _, asked, _ = search(keeps(200, 190, 180, 20), batch_size=8 * 15)
  assert {key[-1] for key in asked} == {3}


def test_objectives_that_want_their_neighbours():
  found, asked, said = search(keeps(200, 190, 180, 40), most=4)
  assert (found.best, asked) == (None, [])
  assert any("neighbours have to stay together" in line for line in said)
  found, asked, said = search(keeps(200, 190, 180, 20), most=4)
  assert found.best[0].accumulate == 4
  found, asked, said = search(keeps(200, 190, 180, 40), most=1)
  assert sum("neighbours" in line for line in said) == 1


def test_a_batch_that_no_mesh_splits():
  with pytest.raises(ValueError, match="batch_size=15.*choose a multiple of 8"):
    search(keeps(5, 4, 3, 2), batch_size=15)


def test_when_time_is_up_what_was_found_has_to_do():
  found, asked, _ = search(keeps(5, 4, 3, 2), late=1)
  assert len(asked) == 1 and found.ended == "the time is up" and found.best is not None
  # Not before something is found.
  found, asked, _ = search(keeps(9, 9, 9, 2), extra=5.0, late=1)
  assert found.best is not None and len(asked) > 1


def test_an_interruption_keeps_what_was_found():
  found, _, _ = search(keeps(5, 4, 3, 2), stops=2)
  assert found.ended == "interrupted" and found.best[0].remat == "none"
  found, _, _ = search(keeps(5, 4, 3, 2), stops=1)
  assert found.ended == "interrupted" and found.best is None


@pytest.mark.parametrize("number", [2, 7])
def test_what_is_told_of_it(number, capsys):
  args = types.SimpleNamespace(config="c.py", json=False)
  topology = types.SimpleNamespace(name="cpu:8")
  found, _, _ = search(keeps(5, 4, 3, 2), stops=number)
  plan_lib._tell_found(found, args, topology)
  out = capsys.readouterr().out
  assert "--config.sharding.mesh.fsdp=8" in out
  assert ("the fastest so far" in out and "interrupted" in out) == (number == 2)
  assert ("the fastest that fits" in out) == (number != 2)
  plan_lib._tell_found(found, types.SimpleNamespace(config="c.py", json=True), topology)
  assert json.loads(capsys.readouterr().out)["ended"] == found.ended


def test_nothing_found_is_told(capsys):
  args = types.SimpleNamespace(config="c.py", json=False)
  topology = types.SimpleNamespace(name="cpu:8")
  with pytest.raises(ValueError, match="c.py does not fit cpu:8 in any way"):
    plan_lib._tell_found(search(keeps(999, 999, 999, 999))[0], args, topology)
  plan_lib._tell_found(search(keeps(5, 4, 3, 2), stops=1)[0], args, topology)
  assert "interrupted; nothing that fits yet" in capsys.readouterr().err


def test_an_error_of_the_compiling_thread_is_the_callers():
  with pytest.raises(ValueError, match="apart"):
    plan_lib._apart(lambda: int("apart"))
  assert plan_lib._apart(lambda: 3) == 3
  assert cli.EXIT_INTERRUPTED == 130


def kept_bytes(*overrides):
  run = load("model.text.depth=3", *overrides)
  known = run_lib.facts(CLIP, config_file.load(CLIP))
  job, _ = run_lib.job(run, known, jax.devices()[:8])
  return kept.of_step(job)


def test_what_is_kept_for_the_backward_pass():
  sizes = [kept_bytes(f"model.remat={remat}") for remat in fit.REMAT]
  assert sizes == sorted(sizes, reverse=True) and sizes[0] > 2 * sizes[-1]
  # With full remat: what goes into each layer, and nothing else. Of 16 images 17 rows
  # in two layers, of 16 texts as many as are long in three, all of width 32.
  assert sizes[-1] == 4 * 32 * 16 * (2 * 17 + 3 * 16)
  assert kept_bytes("batch_size=32", "model.remat=full") == 2 * sizes[-1]
  meshed = ["sharding.mesh.data=2", "sharding.mesh.tensor=2", "sharding.mesh.fsdp=2"]
  assert kept_bytes("model.remat=full", *meshed) == sizes[-1]


BARE = result.Plan(
  config="c",
  overrides=(),
  topology="cpu:8",
  devices=8,
  mesh={},
  batch_size=16,
  steps=1,
  parameters=1,
  note=None,
  memory={},
  needed=0.0,
  capacity=10 * result.GIB,
  usable=10 * result.GIB,
  model_flops=1.0,
  compiled_flops=1.0,
  collectives={},
  seconds=dict(compute=1.0, memory=1.0, interconnect=1.0, serial=1.0, step=1.0),
  limit="compute",
  peak=1.0,
  compile_seconds=0.0,
  unknown_loops=(),
  advice=(),
  versions={},
)
