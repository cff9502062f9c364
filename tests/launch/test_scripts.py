"""The launch scripts, run with a stand-in for Python: nothing is installed."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
SCRIPTS = sorted(ROOT.glob("launch/**/*.sh")) + sorted(ROOT.glob("launch/**/*.sbatch"))
SCRIPTS += [ROOT / ".ci" / "run"]
TOOLS = ("bash", "cat", "chmod", "cp", "dirname", "env", "ls", "mkdir", "mktemp", "rm")
TOOLS += ("sed", "uname")

# Answers as Python would, makes "environments" that are copies of itself, and writes
# down what pip and the program were asked for.
PYTHON = """\
#!/usr/bin/env bash
case "$*" in
  "-m venv --clear --without-pip "* | "-m venv --clear "*)
    [ -z "${{NO_VENV:-}}" ] || exit 1
    [ -z "${{NO_ENSUREPIP:-}}" ] || [ "$4" = --without-pip ] || exit 1
    for venv; do :; done
    mkdir -p "$venv/bin"
    cp "$0" "$venv/bin/python"
    : > "$venv/pyvenv.cfg"
    [ "$4" = --without-pip ] || : > "$venv/has_pip"
    ;;
  "-m pip --version") [ -e "$(dirname "$0")/../has_pip" ] ;;
  "-m pip --python "*) : > "$(dirname "$4")/../has_pip" ;;
  "-m pip install "*) echo "pip $*" >> {log}; exit "${{PIP_RC:-0}}" ;;
  "-m virtualenv "*) exit 1 ;;
  --version | "-c "* | "- "*) exec {real} "$@" ;;
  *) echo "run $*" >> {log} ;;
esac
"""


class Machine:
  """A PATH with only the tools and interpreters that a test puts there."""

  def __init__(self, folder):
    self.folder = folder
    self.bin = folder / "bin"
    self.bin.mkdir()
    self.log = folder / "log"
    self.venv = folder / "venv"
    for tool in TOOLS:
      (self.bin / tool).symlink_to(shutil.which(tool))

  def add(self, name, text):
    path = self.bin / name
    path.write_text(text)
    path.chmod(0o755)
    return path

  def add_python(self, name="python3"):
    return self.add(name, PYTHON.format(log=self.log, real=sys.executable))

  def run(self, *command, **env):
    home = {k: v for k, v in os.environ.items() if k in ("HOME", "LANG", "TMPDIR")}
    env = {"PATH": str(self.bin), "VLP_JAX_VENV": str(self.venv), **home, **env}
    return subprocess.run(
      ["bash", *map(str, command)],
      env=env,
      cwd=self.folder,
      capture_output=True,
      text=True,
      check=False,
    )

  def prepare(self, *extras, **env):
    script = f"set -euo pipefail; . {ROOT}/launch/env.sh; prepare {' '.join(extras)}"
    return self.run("-c", script, **env)

  def installs(self):
    lines = self.log.read_text().splitlines() if self.log.exists() else []
    return [line.split("--editable ")[1] for line in lines if line.startswith("pip ")]


@pytest.fixture
def machine(tmp_path):
  return Machine(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_scripts_are_sound(script):
  subprocess.run(["bash", "-n", script], check=True)
  # Beside this Python, where the extra `test` puts it.
  beside = pathlib.Path(sys.executable).with_name("shellcheck")
  linter = beside if beside.exists() else shutil.which("shellcheck")
  if not linter:
    pytest.skip("shellcheck is not installed")
  subprocess.run([linter, "-x", script], check=True, cwd=ROOT)


def test_installs_once(machine):
  machine.add_python()
  first = machine.prepare()
  assert first.returncode == 0, first.stderr
  assert "making a virtual environment" in first.stderr
  second = machine.prepare()
  assert (second.returncode, second.stderr) == (0, "")
  assert machine.installs() == [str(ROOT)]


def test_each_set_of_extras_is_installed_once(machine):
  machine.add_python()
  for extras in ((), ("test",), (), ("test",)):
    assert machine.prepare(*extras).returncode == 0
  assert machine.installs() == [str(ROOT), f"{ROOT}[test]"]


def test_a_failed_installation_is_tried_again(machine):
  machine.add_python()
  failed = machine.prepare(PIP_RC="1")
  assert failed.returncode == 1
  assert "the installation failed" in failed.stderr
  assert machine.prepare().returncode == 0
  assert len(machine.installs()) == 2


def test_skips_pythons_that_do_not_run_or_are_old(machine):
  # As pyenv's names do where the version is not chosen.
  machine.add("python3.13", "#!/usr/bin/env bash\necho 'not found' >&2\nexit 127\n")
  machine.add("python3.12", "#!/usr/bin/env bash\nexit 1\n")
  machine.add_python("python")
  done = machine.prepare()
  assert done.returncode == 0, done.stderr


def test_no_python(machine):
  machine.add("python3", "#!/usr/bin/env bash\nexit 1\n")
  done = machine.prepare()
  assert done.returncode == 1
  assert "found no Python of 3.11 or newer" in done.stderr
  done = machine.prepare(VLP_PYTHON="/nowhere/python")
  assert "VLP_PYTHON=/nowhere/python is no Python of 3.11" in done.stderr


def test_the_interpreter_can_be_chosen(machine):
  chosen = machine.add_python("my_python")
  done = machine.prepare(VLP_PYTHON=str(chosen))
  assert done.returncode == 0, done.stderr


def test_a_python_without_ensurepip(machine):
  machine.add_python()
  done = machine.prepare(NO_ENSUREPIP="1")
  assert done.returncode == 0, done.stderr
  assert machine.installs() == [str(ROOT)]


def test_no_way_to_an_environment(machine):
  machine.add_python()
  done = machine.prepare(NO_VENV="1")
  assert done.returncode == 1
  assert "apt-get install python3-venv" in done.stderr


def test_leaves_a_folder_alone_that_is_no_environment(machine):
  machine.add_python()
  machine.venv.mkdir()
  (machine.venv / "thesis.tex").write_text("years of work")
  done = machine.prepare()
  assert done.returncode == 1
  assert "is no virtual environment" in done.stderr
  assert (machine.venv / "thesis.tex").exists()


@pytest.mark.parametrize(
  ("env", "extra"),
  [({}, "[cuda]"), (dict(VLP_JAX_ACCELERATOR="cpu"), "")],
)
def test_a_gpu_is_used(machine, env, extra):
  machine.add_python()
  machine.add("nvidia-smi", "#!/usr/bin/env bash\necho 'GPU 0: NVIDIA H100'\n")
  assert machine.prepare(**env).returncode == 0
  assert machine.installs() == [f"{ROOT}{extra}"]


def test_a_driver_without_a_gpu_is_none(machine):
  machine.add_python()
  machine.add("nvidia-smi", "#!/usr/bin/env bash\necho 'No devices'; exit 9\n")
  assert machine.prepare("test", TPU_WORKER_ID="").returncode == 0
  assert machine.installs() == [f"{ROOT}[test]"]


def test_a_tpu_is_used_and_nonsense_refused(machine):
  machine.add_python()
  assert machine.prepare("test", TPU_WORKER_ID="0").returncode == 0
  assert machine.installs() == [f"{ROOT}[tpu,test]"]
  done = machine.prepare(VLP_JAX_ACCELERATOR="abacus")
  assert done.returncode == 1
  assert "VLP_JAX_ACCELERATOR=abacus: say cpu, cuda or tpu" in done.stderr


def test_an_environment_ahead_of_a_job(machine):
  machine.add_python()
  script = ROOT / "launch" / "prepare.sh"
  done = machine.run(script, "cuda")
  assert done.returncode == 0, done.stderr
  assert f"ready: {machine.venv}/bin/python" in done.stderr
  assert machine.run(script).returncode == 0
  assert machine.installs() == [f"{ROOT}[cuda]", str(ROOT)]
  assert "say cpu, cuda or tpu" in machine.run(script, "gpu").stderr
  assert "one argument at most" in machine.run(script, "cuda", "tpu").stderr
  assert "bash launch/prepare.sh [cpu" in machine.run(script, "--help").stdout


def test_quickstart_trains_in_its_workdir(machine):
  machine.add_python()
  script = ROOT / "launch" / "quickstart.sh"
  workdir = machine.folder / "my run"
  done = machine.run(script, "--config.total=3", WORKDIR="my run")
  assert done.returncode == 0, done.stderr
  assert f"{workdir}/report.html" in done.stderr
  (workdir / "config.json").write_text("{}")
  again = machine.run(script, WORKDIR=str(workdir))
  assert "goes on with the run that is there" in again.stderr
  runs = [line for line in machine.log.read_text().splitlines() if "run " in line]
  command = f"run -m vlp_jax.train --config=configs/quickstart.py --workdir={workdir}"
  assert [line for line in runs if line.startswith("run ")] == [
    f"{command} --config.total=3",
    command,
  ]
  assert "WORKDIR=" in machine.run(script, "--help").stdout


def test_test_runs_linter_and_tests(machine):
  machine.add_python()
  done = machine.run(ROOT / ".ci" / "run")
  assert done.returncode == 0, done.stderr
  assert machine.installs() == [f"{ROOT}[test]"]
  lines = machine.log.read_text().splitlines()[1:]
  assert lines == [
    "run -m ruff check .",
    "run -m ruff format --check .",
    "run -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder",
  ]
