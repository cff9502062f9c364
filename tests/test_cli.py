"""The command line: what it reads, how it fails, how soon it answers."""

import os
import pathlib
import subprocess
import sys
import time
import types

import pytest

from vlp_jax import cli
from vlp_jax import clock as clock_lib
from vlp_jax import config_file

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(
    "import ml_collections\n"
    "def get_config(arg=''):\n"
    "  return ml_collections.ConfigDict(dict(seed=3, big=arg == 'big'))\n"
  )
  return path


def parse(*argv, **settings):
  return cli.parse(argv, prog="vlp_jax.train", doc="Trains.", **settings)


def test_parses_config_overrides_and_workdir(file, tmp_path):
  args = parse(
    f"--config={file}:big",
    "--config.seed=5",
    f"--workdir={tmp_path}",
    "--config.total",
    "2 epochs",
  )
  assert args.config.to_dict() == dict(seed=5, big=True, total="2 epochs")
  assert args.workdir == tmp_path


def test_commands_add_options(file, tmp_path):
  args = parse(
    f"--config={file}",
    f"--workdir={tmp_path}",
    "--split=test",
    options=[("--split", dict(default="val"))],
  )
  assert args.rest.split == "test"


def test_the_config_of_the_workdir_is_the_default(file, tmp_path):
  saved = config_file.to_json(config_file.load(str(file)))
  (tmp_path / cli.CONFIG_FILE).write_text(saved)
  args = parse(f"--workdir={tmp_path}", "--config.seed=9")
  assert args.config.to_dict() == dict(seed=9, big=False)
  with pytest.raises(FileNotFoundError, match="say --config=FILE: there is no"):
    parse(f"--workdir={tmp_path / 'new'}")


@pytest.mark.parametrize(
  "argv",
  [
    ["--config=x.py"],
    ["--workdir=x", "--confg=x.py"],
    ["--workdir=x", "--config=x.py", "seed=3"],
  ],
)
def test_wrong_options_end_with_2(argv, capsys):
  with pytest.raises(SystemExit) as end:
    parse(*argv)
  assert end.value.code == 2
  assert "usage: vlp_jax.train --config=FILE[:arg]" in capsys.readouterr().err


def test_an_override_wants_a_value(file):
  with pytest.raises(ValueError, match=r"--config.seed wants a value: --config.seed=v"):
    parse(f"--config={file}", "--config.seed", "--workdir=x")


def test_a_command_gets_the_rest_of_the_line(monkeypatch):
  got = []
  module = types.ModuleType("vlp_jax.train")
  module.main = got.extend
  monkeypatch.setitem(sys.modules, "vlp_jax.train", module)
  monkeypatch.setattr(cli, "COMMANDS", ("train",))
  cli.main(["train", "--config=x.py:a", "--help"])
  assert got == ["--config=x.py:a", "--help"]


def test_the_list_of_commands(capsys):
  with pytest.raises(SystemExit) as end:
    cli.main(["--help"])
  assert end.value.code == 0
  text = capsys.readouterr().out
  assert "Trains what a config says." in text
  assert all(name in text for name in cli.COMMANDS)
  with pytest.raises(SystemExit) as end:
    cli.main(["trian"])
  assert end.value.code == 2


def test_our_errors_are_one_line(capsys, monkeypatch):
  monkeypatch.delenv("VLP_JAX_TRACEBACK", raising=False)
  with pytest.raises(SystemExit) as end, cli.user_errors():
    clock_lib.Clock(batch_size=1, epoch_size=1, total=1).steps("3 weeks")
  assert end.value.code == 2
  err = capsys.readouterr().err
  assert err.startswith("vlp_jax: error: '3 weeks' is no duration")
  assert err.count("\n") == 1


def test_other_errors_keep_their_traceback(monkeypatch):
  monkeypatch.delenv("VLP_JAX_TRACEBACK", raising=False)
  # Raised in another file than the package's.
  with pytest.raises(ValueError, match="invalid literal"), cli.user_errors():
    int("x")
  monkeypatch.setenv("VLP_JAX_TRACEBACK", "1")
  with pytest.raises(ValueError, match="is no duration"), cli.user_errors():
    clock_lib.Clock(batch_size=1, epoch_size=1, total=1).steps("3 weeks")


def test_interrupted(capsys):
  with pytest.raises(SystemExit) as end, cli.user_errors():
    raise KeyboardInterrupt
  assert end.value.code == 130
  assert "interrupted" in capsys.readouterr().err


# A process of ours that waits for jax and tensorflow takes four seconds or more.
@pytest.mark.parametrize(
  "command",
  [
    ["vlp_jax.train", "--help"],
    ["vlp_jax.evaluate", "--help"],
    ["vlp_jax", "--help"],
    ["vlp_jax", "train", "--help"],
  ],
)
def test_help_answers_without_jax(command):
  blocked = (
    "import runpy, sys\n"
    "for name in ('jax', 'flax', 'tensorflow'): sys.modules[name] = None\n"
    f"sys.argv = {[command[0], *command[1:]]!r}\n"
    f"runpy.run_module({command[0]!r}, run_name='__main__', alter_sys=True)"
  )
  run = [sys.executable, "-c", blocked]
  done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert "usage: " in done.stdout


def test_help_is_quick():
  # Of three, the quickest: the machine may be busy.
  def seconds():
    start = time.perf_counter()
    run = [sys.executable, "-m", "vlp_jax.train", "--help"]
    subprocess.run(run, cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start

  assert min(seconds() for _ in range(3)) < 2.0


def test_a_wrong_config_ends_before_jax_is_imported(tmp_path):
  env = {k: v for k, v in os.environ.items() if k != "VLP_JAX_TRACEBACK"}
  run = [sys.executable, "-m", "vlp_jax.train", f"--workdir={tmp_path}"]
  done = subprocess.run(
    [*run, "--config=configs/albf.py"],
    cwd=ROOT,
    env=env,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2
  message = "vlp_jax: error: config: no such file: configs/albf.py; did you mean"
  assert done.stderr.startswith(message)
  assert done.stderr.count("\n") == 1
