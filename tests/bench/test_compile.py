"""The fields of `bench compile`: real starts of a tiny run."""

import json
import pathlib

import pytest

from vlp_jax.bench import compile as compile_lib

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_all_starts_are_timed(tmp_path):
  out = tmp_path / "compile.json"
  config = ROOT / "configs" / "clip.py:tiny"
  compile_lib.main([f"--config={config}", "--repeats=1", f"--out={out}"])
  found = json.loads(out.read_text())
  for name, target in compile_lib.TARGETS.items():
    assert found[name]["target"] == target
    assert found[name]["seconds"] == min(found[name]["all"]) > 0
  assert found["first_step_cached"]["seconds"] < found["first_step_cold"]["seconds"]


def test_a_run_that_fails_is_no_time(tmp_path):
  with pytest.raises(ValueError, match=r"no first step: .*no such file"):
    compile_lib.first_step("missing.py", tmp_path / "run", tmp_path / "cache", 60)
