"""Checkpoints: whole or not there; what is kept, refused, and passed over."""

import errno
import json
import logging
import pathlib
import shutil
import subprocess
import sys

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from vlp_jax.ops import tree
from vlp_jax.training import checkpoint as checkpoint_lib

ROOT = pathlib.Path(__file__).parent.parent.parent
META = {"position": 640, "seed": 3}


@flax.struct.dataclass
class State:
  """Every kind of node that a train state has."""

  step: jax.Array
  params: dict
  opt_state: tuple
  ema: dict | None


def state(step=0, *, width=4):
  rng = np.random.default_rng(step)
  kernel = rng.normal(size=(8, width)).astype(np.float32)
  params = {"model": {"kernel": jnp.asarray(kernel), "temp": jnp.float32(0.07)}}
  # Too large to be kept within an index (which has a checksum), and random.
  params["table"] = jnp.asarray(rng.integers(2**32, size=(32, 32), dtype=np.uint32))
  half = jnp.asarray(kernel, jnp.bfloat16)
  return State(jnp.int32(step), params, (half, {"count": jnp.int32(step)}), None)


def like(of, devices=1):
  mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
  place = lambda x: PartitionSpec("data") if x.ndim else PartitionSpec()
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh, place(x))
    ),
    of,
  )


def folder(path, steps, *, keep=10, best=None, metrics=None):
  """A folder with checkpoints of those steps, closed."""
  checkpoints = checkpoint_lib.Checkpoints(path, keep=keep, best=best)
  for step in steps:
    checkpoints.save(step, state(step), META, (metrics or {}).get(step))
  checkpoints.finish()
  return checkpoint_lib.Checkpoints(path, keep=keep, best=best)


def assert_same(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for path, value in tree.flatten(want).items():
    found = tree.flatten(got)[path]
    assert found.dtype == value.dtype, path
    np.testing.assert_array_equal(np.asarray(found), np.asarray(value), err_msg=path)


# --- Round trips ---------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_what_was_saved_comes_back_in_its_bits(tmp_path, devices):
  checkpoints = folder(tmp_path, [3])
  got, meta = checkpoints.restore(like(state(3), devices))
  assert_same(got, state(3))
  assert meta == META
  kernel = got.params["model"]["kernel"]
  assert len(kernel.sharding.device_set) == devices
  assert kernel.addressable_shards[0].data.shape == (8 // devices, 4)


def test_the_state_may_be_overwritten_at_once(tmp_path):
  checkpoints = checkpoint_lib.Checkpoints(tmp_path)
  forget = jax.jit(lambda x: jax.tree.map(jnp.zeros_like, x), donate_argnums=0)
  saved = state(1)
  checkpoints.save(1, saved, META)
  forget(saved)
  checkpoints.finish()
  got, _ = checkpoint_lib.Checkpoints(tmp_path).restore(like(state(1)))
  assert_same(got, state(1))


def test_the_newest_is_taken_unless_one_is_named(tmp_path):
  checkpoints = folder(tmp_path, [2, 4, 6])
  assert int(checkpoints.restore(like(state()))[0].step) == 6
  assert int(checkpoints.restore(like(state()), step=4)[0].step) == 4


# --- What is kept --------------------------------------------------------------


def test_the_newest_are_kept(tmp_path):
  assert folder(tmp_path, [1, 2, 3, 4, 5], keep=2).steps() == [4, 5]


def test_the_best_is_kept_as_well(tmp_path):
  metrics = {s: {"test/mean": m} for s, m in {1: 5.0, 2: 9.0, 3: 7.0, 4: 1.0}.items()}
  checkpoints = folder(
    tmp_path, [1, 2, 3, 4, 5], keep=1, best="test/mean", metrics=metrics
  )
  assert checkpoints.steps() == [2, 5]
  assert checkpoints.best_step() == 2


def test_without_a_metric_there_is_no_best(tmp_path):
  assert folder(tmp_path, [1, 2], best="test/mean").best_step() is None
  assert folder(tmp_path / "no", [1]).best_step() is None


# --- What is not there, or of another model --------------------------------------


def test_nothing_to_restore(tmp_path):
  with pytest.raises(FileNotFoundError, match="checkpoint: none in .*: there is none"):
    checkpoint_lib.Checkpoints(tmp_path).restore(like(state()))


def test_a_step_that_is_not_there(tmp_path):
  with pytest.raises(FileNotFoundError, match="none of step 5 in .* steps \\[1, 2\\]"):
    folder(tmp_path, [1, 2]).restore(like(state()), step=5)


def test_another_model_is_told_by_what_differs(tmp_path):
  checkpoints = folder(tmp_path, [1, 2])
  other = state(width=6)
  other = other.replace(params={**other.params, "head": jnp.zeros(2)}, ema={})
  with pytest.raises(ValueError, match="is of another model") as told:
    checkpoints.restore(like(other))
  text = str(told.value)
  assert "only in this config: params/head (2,)" in text
  assert "params/model/kernel: (8, 4) in the checkpoint, (8, 6) in this config" in text
  # All of them are: falling back to the one before would not help.
  assert "using step" not in text


# --- Damage --------------------------------------------------------------------


def damage(path, how):
  """Hurts a checkpoint as a disk, a hand, or a broken copy does."""
  files = [f for f in (path / "state").rglob("*") if f.is_file() and f.stat().st_size]
  arrays = [f for f in files if "d" in f.relative_to(path / "state").parts]
  assert arrays
  if how == "removed":
    shutil.rmtree(path / "state")
  elif how == "an empty folder":
    shutil.rmtree(path)
    path.mkdir()
  elif how == "half deleted":
    for file in sorted(f for f in path.rglob("*") if f.is_file())[::2]:
      file.unlink()
  elif how == "empty":
    for file in arrays:
      file.write_bytes(b"")
  elif how == "cut":
    for file in arrays:
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  elif how == "one file missing":
    max(arrays, key=lambda f: f.stat().st_size).unlink()
  elif how == "a flipped bit":
    table = np.asarray(state(4).params["table"]).tobytes()
    holding = [f for f in arrays if table[:64] in f.read_bytes()]
    assert holding
    for file in holding:
      data = bytearray(file.read_bytes())
      data[data.index(table[:64]) + 5] ^= 0x10
      file.write_bytes(bytes(data))
  elif how == "another position":
    meta = path / "meta" / "metadata"
    text = meta.read_text()
    assert text.count("640") == 1
    meta.write_text(text.replace("640", "641"))
  elif how == "metadata":
    (path / "state" / "_METADATA").write_bytes(b"{")
  else:
    raise ValueError(how)


DAMAGES = (
  "removed",
  "an empty folder",
  "half deleted",
  "empty",
  "cut",
  "one file missing",
  "a flipped bit",
  "another position",
  "metadata",
)


def told(caplog, level):
  name = checkpoint_lib.__name__
  records = [r for r in caplog.records if r.name == name and r.levelno == level]
  return [record.getMessage() for record in records]


RESTORE = """
import json, sys
from tests.training import test_checkpoint as t
for folder in json.loads(sys.argv[1]):
  checkpoints = t.checkpoint_lib.Checkpoints(folder, best="test/mean")
  got, meta = checkpoints.restore(t.like(t.state(), devices=1))
  t.assert_same(got, t.state(2))
  assert meta == t.META, meta
  # The run goes on, and saves before and at the step that was damaged.
  checkpoints.save(3, t.state(3), t.META, {"test/mean": 2.0})
  checkpoints.save(4, t.state(4), t.META, {"test/mean": 3.0})
  checkpoints.finish()
  again = t.checkpoint_lib.Checkpoints(folder)
  assert again.steps() == [3, 4], again.steps()
  t.assert_same(again.restore(t.like(t.state()))[0], t.state(4))
  again.finish()
  print("restored", folder, flush=True)
"""


def test_a_damaged_one_is_passed_over_for_the_one_before(tmp_path):
  """With a warning that names both, and it is put aside, for the run to go on."""
  folders = []
  for i, how in enumerate(DAMAGES):
    folders.append(str(tmp_path / str(i)))
    metrics = {2: {"test/mean": 0.5}, 4: {"test/mean": 1.0}}
    folder(folders[-1], [2, 4], best="test/mean", metrics=metrics)
    damage(tmp_path / str(i) / "4", how)
  # In a process of its own: other reads fail later, and would be told to other tests.
  command = [sys.executable, "-c", RESTORE, json.dumps(folders)]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  for how, path in zip(DAMAGES, folders, strict=True):
    assert f"restored {path}\n" in done.stdout, (how, done.stderr[-3000:])
    assert f"{path}/4 is damaged" in done.stderr, how
    assert f"using step 2, the one before it, {path}/2" in done.stderr, how
    assert f"what is damaged is in {path}/damaged-4" in done.stderr, how
  bit = done.stderr.partition(f"{folders[DAMAGES.index('a flipped bit')]}/4 is damaged")
  assert bit[2].startswith(" (params/table: not the bits that were saved)")


def test_a_damaged_one_that_is_asked_for_is_an_error(tmp_path):
  folder(tmp_path, [2, 4])
  damage(tmp_path / "4", "metadata")
  with pytest.raises(OSError, match=r"/4 is damaged \(.*others .* there: \[2\]"):
    checkpoint_lib.Checkpoints(tmp_path).restore(like(state()), step=4)


# --- Saves that fail -----------------------------------------------------------


def full_disk(monkeypatch, checkpoints):
  def save(*args, **kwargs):
    raise RuntimeError("write failed") from OSError(errno.ENOSPC, "No space left")

  monkeypatch.setattr(checkpoints._manager, "save", save)


def test_a_failed_save_is_told_and_tried_again(tmp_path, monkeypatch, caplog):
  checkpoints = folder(tmp_path, [2])
  full_disk(monkeypatch, checkpoints)
  checkpoints.save(4, state(4), META)
  (error,) = told(caplog, logging.ERROR)
  assert "step 4 could not be saved" in error and "No space left" in error
  assert "the last whole checkpoint is step 2" in error
  # There is room again.
  checkpoints.save(6, state(6), META)
  checkpoints.finish()
  assert checkpoint_lib.Checkpoints(tmp_path).steps() == [2, 6]


def test_a_failed_save_is_tried_again_sooner_than_the_next(tmp_path, monkeypatch):
  checkpoints = folder(tmp_path, [2])
  assert not checkpoints.retry_due(3)
  for step, due in ((4, 14), (14, 34), (34, 74)):
    full_disk(monkeypatch, checkpoints)
    checkpoints.save(step, state(step), META)
    assert not checkpoints.retry_due(due - 1)
    assert checkpoints.retry_due(due)
  checkpoints.save(74, state(74), META)
  checkpoints.wait()
  assert not checkpoints.retry_due(1_000)
  checkpoints.finish()
  assert checkpoint_lib.Checkpoints(tmp_path).steps() == [2, 74]


def test_a_save_that_fails_in_the_background_is_noticed(tmp_path, monkeypatch, caplog):
  checkpoints = folder(tmp_path, [2])

  def refused(*args, **kwargs):
    raise OSError("503: slow down")

  checkpoints.save(4, state(4), META)
  checkpoints._manager.wait_until_finished()
  monkeypatch.setattr(checkpoints._manager, "wait_until_finished", refused)
  assert not checkpoints.retry_due(5)
  (error,) = told(caplog, logging.ERROR)
  assert "step 4 could not be saved" in error and "503: slow down" in error
  assert checkpoints.retry_due(14)


def test_the_last_save_is_tried_again_if_the_store_refuses(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint_lib, "PAUSES", (0.0, 0.01))
  checkpoints = folder(tmp_path, [2])
  tries = []

  def refused(*args, **kwargs):
    tries.append(args)
    raise OSError("503: slow down")

  monkeypatch.setattr(checkpoints._manager, "save", refused)
  checkpoints.save(4, state(4), META, last=True)
  checkpoints.finish()
  assert len(tries) == 1
  got, _ = checkpoint_lib.Checkpoints(tmp_path).restore(like(state()))
  assert_same(got, state(4))


def test_the_last_save_is_not_tried_for_ever(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint_lib, "PAUSES", (0.0, 0.01))
  tries = []

  def refused(manager, *args, **kwargs):
    tries.append(args)
    raise OSError("503: slow down")

  checkpoints = folder(tmp_path, [2])
  monkeypatch.setattr(checkpoint_lib.ocp.CheckpointManager, "save", refused)
  checkpoints.save(4, state(4), META, last=True)
  with pytest.raises(checkpoint_lib.CheckpointError, match="step 4 .*503: slow down"):
    checkpoints.finish()
  assert len(tries) == 3


def test_the_last_save_must_not_fail(tmp_path, monkeypatch):
  checkpoints = folder(tmp_path, [2])
  full_disk(monkeypatch, checkpoints)
  # A full disk does not empty itself within seconds: nobody waits for that.
  monkeypatch.setattr(checkpoint_lib.time, "sleep", lambda seconds: pytest.fail())
  checkpoints.save(4, state(4), META, last=True)
  with pytest.raises(checkpoint_lib.CheckpointError, match="step 4 .*No space left"):
    checkpoints.finish()
  assert checkpoint_lib.Checkpoints(tmp_path).steps() == [2]
