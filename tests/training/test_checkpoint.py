"""Checkpoints: whole or not there; what is kept, refused, and passed over."""

import errno
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
  """Hurts the arrays of a checkpoint as a disk, or a broken copy, does."""
  files = [f for f in (path / "state").rglob("*") if f.is_file() and f.stat().st_size]
  arrays = [f for f in files if "d" in f.relative_to(path / "state").parts]
  assert arrays
  if how == "removed":
    shutil.rmtree(path / "state")
  elif how == "empty":
    for file in arrays:
      file.write_bytes(b"")
  elif how == "cut":
    for file in arrays:
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  else:
    (path / "state" / "_METADATA").write_bytes(b"{")


def told(caplog, level):
  name = checkpoint_lib.__name__
  records = [r for r in caplog.records if r.name == name and r.levelno == level]
  return [record.getMessage() for record in records]


@pytest.mark.parametrize("how", ["removed", "metadata"])
def test_a_damaged_one_is_passed_over_for_the_one_before(tmp_path, how, caplog):
  folder(tmp_path, [2, 4])
  damage(tmp_path / "4", how)
  checkpoints = checkpoint_lib.Checkpoints(tmp_path)
  got, _ = checkpoints.restore(like(state()))
  assert_same(got, state(2))
  (warning,) = told(caplog, logging.WARNING)
  assert f"{tmp_path / '4'} is damaged" in warning and "using step 2" in warning


RESTORE = """
import sys
from tests.training import test_checkpoint as t
checkpoints = t.checkpoint_lib.Checkpoints(sys.argv[1])
got, _ = checkpoints.restore(t.like(t.state()))
t.assert_same(got, t.state(2))
print("restored", int(got.step))
"""


@pytest.mark.parametrize("how", ["empty", "cut"])
def test_arrays_that_were_cut_are_passed_over(tmp_path, how):
  # In a process of its own: other reads fail later, and would be told to other tests.
  folder(tmp_path, [2, 4])
  damage(tmp_path / "4", how)
  command = [sys.executable, "-c", RESTORE, str(tmp_path)]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert "restored 2" in done.stdout, done.stderr[-2000:]
  assert f"{tmp_path / '4'} is damaged" in done.stderr
  assert "using step 2, the one before it" in done.stderr


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


def test_the_last_save_must_not_fail(tmp_path, monkeypatch):
  checkpoints = folder(tmp_path, [2])
  full_disk(monkeypatch, checkpoints)
  checkpoints.save(4, state(4), META)
  with pytest.raises(checkpoint_lib.CheckpointError, match="step 4 .*No space left"):
    checkpoints.finish()
  assert checkpoint_lib.Checkpoints(tmp_path).steps() == [2]
