"""A run without a model: processes that tell each other their number, round by round.

ROUNDS: how many; MISTAKE: which process makes one (or all), in the second round; STUCK:
which is stuck there. FOLDER: what else they do together is checked before, on two
devices each.
"""

import os
import pathlib
import sys
import threading
import time

import jax
from jax.experimental import multihost_utils
import numpy as np

from vlp_jax import cli
from vlp_jax.training import cluster
from vlp_jax.training import course
from vlp_jax.training import distributed
from vlp_jax.training import sharding


def check_rows(devices, **mesh):
  """That a batch is whole when each process has fed its rows."""
  mesh = sharding.make_mesh(sharding.Sharding(mesh=mesh), devices)
  rows = sharding.local_rows(8, mesh)
  split = sharding.put_batch({"x": rows[:, None]}, mesh)["x"]
  assert split.shape == (8, 1), split.shape
  whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(split)
  assert np.asarray(whole)[:, 0].tolist() == list(range(8)), mesh
  return rows.tolist()


def check_meshes():
  devices, first = jax.devices(), 4 * jax.process_index()
  assert check_rows(devices, data=4) == list(range(first, first + 4))
  # Both processes hold parts of the same rows.
  assert check_rows(devices, data=1, tensor=4) == list(range(8))
  # As on a pod, where neighbours in the mesh are of several machines.
  mixed = devices[::2] + devices[1::2]
  rows = check_rows(mixed, data=2, fsdp=2)
  assert rows == [r + first // 2 for r in (0, 1, 4, 5)], rows
  assert check_rows(mixed, data=2, tensor=2) == list(range(8))


def check_made_once():
  """Each has a folder of its own, and a file that one of them made."""
  path = pathlib.Path(f"{os.environ['FOLDER']}.{jax.process_index()}") / "file"

  def make():
    path.parent.mkdir()
    path.write_bytes(f"by {jax.process_index()}".encode())

  for _ in range(2):
    distributed.made_once(path, make)
    assert path.read_bytes() == b"by 0"


def main():
  with distributed.joined(), cli.user_errors():
    me = jax.process_index()
    if "FOLDER" in os.environ:
      check_meshes()
      check_made_once()
    for done in range(int(os.environ["ROUNDS"])):
      got = multihost_utils.process_allgather(np.int32(me))
      assert got.tolist() == list(range(jax.process_count()))
      if not done:
        course.turn_to("trains")
      print("round", done, flush=True)
      if done and os.environ.get("MISTAKE") in (str(me), "all"):
        cluster.find({"VLP_JAX_COORDINATOR": "nowhere"})
      if done and os.environ.get("STUCK") == str(me):
        threading.Event().wait()
      course.go_on()
      time.sleep(0.05)
  sys.exit(0)


if __name__ == "__main__":
  main()
