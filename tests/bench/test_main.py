"""`vlp-jax bench`: which benchmarks there are."""

import pathlib

import pytest

from vlp_jax import cli
from vlp_jax.bench import __main__ as bench


def test_the_file_is_the_registry(capsys):
  folder = pathlib.Path(bench.__file__).parent
  assert {"step", "input", "compile"} <= set(bench.kinds())
  assert all((folder / f"{kind}.py").is_file() for kind in bench.kinds())
  cli.main(["bench"])
  assert "bench step|tune|input|contrastive|compile" in capsys.readouterr().out


def test_others_are_told(capsys):
  with pytest.raises(SystemExit):
    bench.main(["stpe"])
  assert "stpe: there is no such benchmark; there are step" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["step", "input", "compile"])
def test_each_has_help(kind, capsys):
  with pytest.raises(SystemExit) as end:
    bench.main([kind, "--help"])
  assert end.value.code == 0
  assert "--out" in capsys.readouterr().out
