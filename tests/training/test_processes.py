"""One run is the same run in one process and in several, each with its own rows."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
SECONDS = 300
# As in test_sharding.py.
TOLERANCE, SMALLEST = 1e-5, 1e-2


def free_port():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def take_steps(count, folder):
  """What `taking_steps.py` finds in so many processes."""
  path, port = folder / f"{count}.npz", free_port()
  name = "tests.training.taking_steps"
  given = [sys.executable, "-m", name]
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  started = [
    subprocess.Popen(
      [*given, str(index), str(count), str(port), str(path)],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(count)
  ]
  try:
    said = [process.communicate(timeout=SECONDS)[0] for process in started]
  finally:
    for process in started:
      process.kill()
  assert [p.returncode for p in started] == [0] * count, said
  return dict(np.load(path))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  return take_steps(1, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize(
  "count", [2, pytest.param(4, marks=pytest.mark.slow)], ids="{}-processes".format
)
def test_steps_are_the_same_in_several_processes(count, alone, tmp_path):
  found = take_steps(count, tmp_path)
  assert found.keys() == alone.keys()
  for key, want in alone.items():
    # Negatives, counters and ids of the queue.
    if want.dtype.kind in "ib":
      np.testing.assert_array_equal(found[key], want, err_msg=key)
      continue
    scale = max(np.abs(want).max(initial=0), SMALLEST)
    np.testing.assert_allclose(
      found[key], want, rtol=0, atol=TOLERANCE * scale, err_msg=key
    )
  queued = alone["state/memory/objectives_itc/id_queue"]
  assert (queued >= 100).all() and alone["0/drawn/2"].all()
