"""The Dockerfiles: linted, and what they copy and run is what this clone has."""

import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
FILES = {
  path.name.partition(".")[0]: path for path in ROOT.glob("launch/docker/*.Dockerfile")
}


def instructions(path):
  """[(word, the rest)] with continued lines joined."""
  text = re.sub(r"\\\n", " ", path.read_text("utf-8"))
  lines = [line for line in text.splitlines() if line and not line.startswith("#")]
  return [(word, rest.strip()) for word, _, rest in (x.partition(" ") for x in lines)]


def test_there_is_one_for_each():
  assert sorted(FILES) == ["cpu", "cuda", "tpu"]


@pytest.mark.parametrize("path", FILES.values(), ids=FILES)
def test_hadolint(path):
  beside = pathlib.Path(sys.executable).with_name("hadolint")
  linter = beside if beside.exists() else shutil.which("hadolint")
  if not linter:
    pytest.skip("hadolint is not installed")
  done = subprocess.run([linter, path], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_is_there(name):
  ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
  copied = []
  for word, rest in instructions(FILES[name]):
    if word == "COPY":
      *sources, target = shlex.split(rest)
      for source in sources:
        assert (ROOT / source).exists(), source
        assert any(
          source == kept[1:] or source.startswith(f"{kept[1:]}/")
          for kept in ignored
          if kept.startswith("!")
        ), f"{source} is ignored"
      copied += [target] if len(sources) == 1 else sources
  # What pip reads: setup.cfg names the README and the licence.
  assert {"setup.cfg", "pyproject.toml", "README.md", "LICENSE"} <= set(copied)
  assert {"configs", "vlp_jax"} <= set(copied)


@pytest.mark.parametrize("name", FILES)
def test_it_is_installed_as_everywhere(name, tmp_path):
  """RUN is `prepare` of launch/env.sh, with the extra of the accelerator."""
  words = instructions(FILES[name])
  env = {}
  for word, rest in words:
    if word == "ENV":
      env |= dict(item.split("=", 1) for item in shlex.split(rest))
  assert env["VLP_JAX_ACCELERATOR"] == name
  assert env["PATH"].split(":")[0] == env["VLP_JAX_VENV"] + "/bin"
  (run,) = [rest for word, rest in words if word == "RUN"]
  assert run == ". launch/env.sh && prepare"
  (shell,) = [rest for word, rest in words if word == "SHELL"]
  assert shell == '["/bin/bash", "-euo", "pipefail", "-c"]'
  script = f'. "{ROOT}/launch/env.sh"; accelerator'
  done = subprocess.run(
    ["bash", "-euo", "pipefail", "-c", script],
    env={"PATH": "/usr/bin:/bin", "VLP_JAX_ACCELERATOR": name},
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.strip() == {"cpu": "", "cuda": "cuda", "tpu": "tpu"}[name]


@pytest.mark.parametrize("name", FILES)
def test_it_trains(name):
  words = dict(instructions(FILES[name]))
  assert words["ENTRYPOINT"] == '["python", "-m", "vlp_jax.train"]'
  assert words["FROM"] == "python:3.11-slim"
