"""The fields of `bench step`, at a tiny size and without TensorFlow."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from vlp_jax.bench import peak
from vlp_jax.bench import program
from vlp_jax.bench import rivals
from vlp_jax.bench import step
from vlp_jax.bench import suite
from vlp_jax.planning import flops

ROOT = pathlib.Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "clip.py:tiny")

WITHOUT = """
import sys
for name in ("tensorflow", "tensorflow_datasets", "torch"):
  sys.modules[name] = None
from vlp_jax.bench import __main__ as bench
bench.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
  out = tmp_path_factory.mktemp("bench") / "step.json"
  options = [f"--config={TINY}", "--batch_size=4", "--repeats=2", f"--out={out}"]
  done = subprocess.run(
    [sys.executable, "-c", WITHOUT, "step", *options],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(out.read_text())
  assert json.loads(done.stdout) == found
  return found


def test_a_step_is_timed_without_tensorflow(results):
  assert results["batch_size"] == 4
  assert results["repeats"] == 2
  for key in ("step_ms", "examples_per_second", "mfu"):
    assert results[key]["best"] > 0
  assert results["step_ms"]["best"] <= results["step_ms"]["median"]
  assert results["mfu"]["best"] >= results["mfu"]["median"]
  assert results["machine"]["cores"] >= 1


def test_its_numbers_agree(results):
  seconds = results["step_ms"]["best"] / 1e3
  rate = 4 / seconds
  assert results["examples_per_second"]["best"] == pytest.approx(rate)
  top = results["peak"]
  assert top["source"] == "measured"
  assert top["flops_per_second"] == top["matmul_flops_per_second"]
  mfu = results["model_flops_per_step"] / seconds / top["flops_per_second"]
  assert results["mfu"]["best"] == pytest.approx(mfu)
  assert results["memory"]["peak"] > results["memory"]["temporaries"] > 0
  # Parameters and both moments of Adam, in float32, are arguments of the step.
  assert results["memory"]["arguments"] > 12 * results["parameters"]
  assert all(value > 0 for value in results["seconds"].values())


def model_flops(job):
  return flops.of_step(job, job.pretrainer.model.text.vocab)


def test_flops_are_those_of_the_model_and_not_of_rematerialisation():
  few = ["--config.model.image.depth=1", "--config.model.text.depth=1"]
  plain = program.load(TINY, few, batch_size=8)
  again = program.load(TINY, [*few, "--config.model.remat='full'"], batch_size=8)
  more = program.load(TINY, [few[1]], batch_size=8)
  assert model_flops(again) == model_flops(plain)
  # The second layer of the image tower: 16 patches and a class token, width 32.
  tokens, width, mlp = 17, 32, 64
  layer = 2 * tokens * (4 * width**2 + 2 * width * mlp + 2 * tokens * width)
  assert model_flops(more) - model_flops(plain) == 3 * 8 * layer


def test_what_is_not_one_program_is_refused():
  with pytest.raises(ValueError, match=r"set --config.accumulate=1"):
    program.load(TINY, ["--config.accumulate=2"], batch_size=8)
  with pytest.raises(ValueError, match=r"data.kinds \(images, texts\): with --real"):
    step.measure(str(ROOT / "configs" / "flava.py:tiny"), batch_size=8, real=True)


def test_of_several_kinds_of_data_all_are_in_the_step():
  job = program.load(str(ROOT / "configs" / "flava.py:tiny"), batch_size=8)
  assert set(job.batch) == {"pairs", "images", "texts"}


def test_published_peaks():
  assert peak.published("NVIDIA H200", "bfloat16") == 989.4e12
  assert peak.published("NVIDIA H100 80GB HBM3", "bfloat16") == 989.4e12
  assert peak.published("NVIDIA H100 PCIe", "float32") == 378e12
  assert peak.published("TPU v5 lite", "bfloat16") == 197e12
  assert peak.published("cpu", "float32") is None


def test_a_config_without_a_card_wants_a_vocabulary(tmp_path):
  own = tmp_path / "mine.py"
  own.write_text("import runpy\n" + (ROOT / "configs" / "clip.py").read_text())
  with pytest.raises(FileNotFoundError, match="say --vocabulary=N"):
    program.load(f"{own}:tiny")
  job = program.load(f"{own}:tiny", vocabulary=50, batch_size=8)
  assert job.pretrainer.model.text.vocab.size == 50


def test_unknown_rivals_and_options_are_told(capsys):
  job = program.load(TINY, batch_size=8)
  with pytest.raises(ValueError, match="did you mean 'open_clip'"):
    rivals.start("openclip", job)
  for argv in (["--repeats=2"], [f"--config={TINY}", "--repeats=0"]):
    with pytest.raises(SystemExit):
      step.main(argv)
  err = capsys.readouterr().err
  assert "say --config=FILE" in err
  assert "--repeats=0: want 1 or more" in err


def test_rivals_are_told_our_sizes():
  job = program.load(str(ROOT / "configs" / "albef.py:tiny"), suite.ALONE, batch_size=8)
  sizes = rivals.sizes(job)
  assert json.loads(json.dumps(sizes)) == sizes
  assert sizes["image"] == dict(width=32, depth=2, num_heads=2, mlp_dim=64, act="gelu")
  assert sizes["fusion"]["depth"] == 2
  assert (sizes["res"], sizes["patch"], sizes["length"]) == (32, 16, 16)
  assert job.abstract_state.ema is None


@pytest.mark.slow
def test_a_step_on_the_data_of_its_config():
  found = step.measure(TINY, batch_size=8, repeats=2, real=True, loop=True)
  assert 0 <= found["input_wait"] < 1
  assert found["loop"]["ms_per_step"] > 0
  share = found["loop"]["ms_per_step"] / found["step_ms"]["median"]
  assert found["loop"]["share_of_step"] == pytest.approx(share)


@pytest.mark.slow
def test_the_suite_of_one_machine_in_its_dry_shape(tmp_path):
  """Ours and PyTorch's of the same sizes; an entry that fails fails alone."""
  pytest.importorskip("torch")
  out = tmp_path / "suite.json"
  suite.run("tiny", [], limit=300, out=out)
  found = json.loads(out.read_text())
  assert set(found["entries"]) == {entry.name for entry in suite.TINY}
  for entry in found["entries"].values():
    assert "failed" not in entry
    assert entry["ratio"]["best"] > 0
    ours, theirs = entry["parameters"], entry["against"]["parameters"]
    assert theirs == pytest.approx(ours, rel=0.03)


def test_a_suite_says_what_there_was_no_time_for(tmp_path):
  out = tmp_path / "suite.json"
  suite.run("gpu", [], limit=0, out=out)
  entries = json.loads(out.read_text())["entries"]
  assert len(entries) == len(suite.GPU)
  assert all("left_out" in entry for entry in entries.values())


def test_the_entries_for_a_gpu_are_configs_that_build():
  """Shapes alone; the same programs would run there."""
  for entry in suite.GPU[:4]:
    argv = entry.argv(pathlib.Path("x.json"), None, compiled=True)
    assert ("--torch_compile" in argv) == (entry.against is not None)
    config = next(a for a in argv if a.startswith("--config="))
    overrides = [a for a in argv if a.startswith("--config.")]
    job = program.load(
      config.removeprefix("--config="), overrides, batch_size=entry.batch_size
    )
    assert job.pretrainer.model.dtype == "bfloat16"
    assert job.batch["image"].shape[0] == entry.batch_size
