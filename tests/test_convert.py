"""`vlp-jax convert`: every format there and back, found by its names; bad input."""

import json
import os
import pathlib
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop import test_reader
from vlp_jax import batch as batch_lib
from vlp_jax import build
from vlp_jax import cli
from vlp_jax import clock as clock_lib
from vlp_jax import config as config_lib
from vlp_jax import config_file
from vlp_jax import convert
from vlp_jax.interop import albef
from vlp_jax.interop import formats
from vlp_jax.interop import hf
from vlp_jax.interop import initial
from vlp_jax.interop import native
from vlp_jax.interop import reader
from vlp_jax.ops import tree as tree_lib
from vlp_jax.training import checkpoint
from vlp_jax.training import step as step_lib

ROOT = pathlib.Path(__file__).parent.parent
REFERENCE = ROOT / "tests" / "reference"
HEADS = ("num_heads_image=4", "num_heads_text=4")
METER = ("num_heads_text=4", "num_heads_fusion=4")
# Where an example is -> its format, and what its `load` must be told.
EXAMPLES = {
  "albef/weights.safetensors": ("albef", HEADS),
  "albef_retrieval/weights.safetensors": ("albef_tasks", HEADS),
  "albef_ve/weights.safetensors": ("albef_tasks", HEADS),
  "albef_nlvr/weights.safetensors": ("albef_tasks", HEADS),
  "albef_vqa/weights.safetensors": ("albef_tasks", HEADS),
  "hf/bert": ("hf_bert", ()),
  "hf/bert_mlm": ("hf_bert", ()),
  "hf/roberta": ("hf_bert", ()),
  "hf/vit": ("hf_vit", ()),
  "vilt/weights.safetensors": ("vilt", ("num_heads=4",)),
  "vilt_vqa/weights.safetensors": ("vilt", ("num_heads=4",)),
  "vilt_irtr/weights.safetensors": ("vilt", ("num_heads=4",)),
  "meter/weights.safetensors": ("meter", METER),
  "meter_nlvr2/weights.safetensors": ("meter", METER),
  "vlp/weights.safetensors": ("vlp", ("num_heads=4",)),
  "clip_vit/model_jit.pt": ("clip", ()),
  "hf_clip": ("hf_dual", ()),
  "hf_siglip": ("hf_dual", ()),
  "openclip_siglip/weights.safetensors": ("open_clip", HEADS),
}


def run(*argv):
  convert.main([str(arg) for arg in argv])


def tensors_of(path):
  return hf.read(path).tensors if path.is_dir() else reader.load(path)


@pytest.mark.parametrize("example", EXAMPLES)
def test_there_and_back_bit_by_bit(example, tmp_path, capsys):
  path = REFERENCE / example
  name, options = EXAMPLES[example]
  assert formats.find(path) == name
  more = [part for option in options for part in ("--set", option)]
  run("--weights", path, "--out", tmp_path / "ours", *more)
  assert f"{name} -> native" in capsys.readouterr().out
  again = tmp_path / ("again" if path.is_dir() else "again.pth")
  run("--weights", tmp_path / "ours", "--to", name, "--out", again)
  want, got = tensors_of(path), tensors_of(again)
  assert got.keys() == want.keys()
  for key, x in want.items():
    assert got[key].dtype == x.dtype and got[key].tobytes() == x.tobytes(), key


def test_a_run_starts_from_a_converted_folder(tmp_path):
  folder = tmp_path / "ours"
  run("--weights", REFERENCE / "hf/vit", "--out", folder)
  params = native.load(folder).fields["params"]
  wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  spec = dict(type="native", path=str(folder))
  got = initial.load(spec, wanted)
  jax.tree.map(np.testing.assert_array_equal, got, params)
  image = dict(model=wanted["model"], more=dict(head=wanted["pooler"]["bias"]))
  with pytest.raises(ValueError) as error:
    initial.load(spec, image)
  for text in ("no place for (2)", "pooler/kernel", "missing leaves (1)", "more/head"):
    assert text in str(error.value)
  fits = initial.load(spec | dict(skip=("pooler/.*",), fresh=("more/.*",)), image)
  assert isinstance(fits["more"]["head"], jax.ShapeDtypeStruct)


def test_a_key_of_a_torch_file(tmp_path):
  path = REFERENCE / "albef_ve/weights.safetensors"
  more = [part for option in HEADS for part in ("--set", option)]
  run("--weights", path, "--out", tmp_path / "ours", *more)
  file = tmp_path / "ve.pth"
  back = ("--weights", tmp_path / "ours", "--to", "albef_tasks", "--out", file)
  run(*back, "--key", "model")
  assert reader.load(file, key="model").keys() == reader.load(path).keys()
  assert formats.find(file) == "albef_tasks"


def fails(capsys, *argv):
  with pytest.raises(SystemExit) as error:
    run(*argv)
  assert error.value.code == cli.EXIT_USER_ERROR
  return capsys.readouterr().err


def test_what_users_get_wrong(tmp_path, capsys):
  vit, out = REFERENCE / "hf/vit", tmp_path / "out"
  ve = REFERENCE / "albef_ve/weights.safetensors"
  told = fails(capsys, "--weights", vit, "--out", out, "--from", "hf_vti")
  assert "no format 'hf_vti'" in told and "Did you mean 'hf_vit'?" in told
  told = fails(capsys, "--weights", ve, "--out", out, "--set", "heads=4")
  assert "albef_tasks: no option 'heads'; it has task, num_heads_image" in told
  told = fails(capsys, "--weights", ve, "--out", out, "--set", "heads")
  assert "--set heads: want NAME=VALUE" in told
  told = fails(capsys, "--weights", ve, "--out", out)
  assert "width 24, not a multiple of 64" in told and "num_heads_image=…" in told
  told = fails(capsys, "--weights", tmp_path / "none", "--out", out)
  assert "no directory" in told
  file = tmp_path / "odd.safetensors"
  reader.save(file, {"a.b": np.zeros(2)})
  told = fails(capsys, "--weights", file, "--out", out)
  assert "is of no format that is known by its names" in told and "a.b …" in told
  told = fails(capsys, "--weights", vit, "--to", "albef", "--out", out)
  assert "--to albef: a checkpoint of hf_vit has params" in told
  assert not out.exists()
  run("--weights", vit, "--out", out)
  told = fails(capsys, "--weights", vit, "--out", out)
  assert "has a checkpoint already" in told
  told = fails(capsys, "--weights", out, "--to", "hf_vit", "--out", out)
  assert "is there already" in told
  content = json.loads((out / native.FILE).read_text())
  (out / native.FILE).write_text(json.dumps(content | dict(trees=["../params"])))
  told = fails(capsys, "--weights", out, "--to", "hf_vit", "--out", tmp_path / "x")
  assert "is no file of this folder" in told
  (out / native.FILE).write_text("{")
  told = fails(capsys, "--weights", out, "--to", "hf_vit", "--out", tmp_path / "x")
  assert "is damaged" in told


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
def test_no_container_runs_code(tmp_path, capsys, suffix):
  marker = tmp_path / "ran"
  evil = test_reader.Evil(os.system, f"touch {marker}")
  file = tmp_path / f"bad{suffix}"
  shutil.copy(test_reader.archive(tmp_path, {"model": {"x": evil}}), file)
  told = fails(capsys, "--weights", file, "--out", tmp_path / "out")
  assert "refused: it asks for" in told and not marker.exists()
  told = fails(capsys, "--weights", file, "--out", tmp_path / "out", "--from", "albef")
  assert "refused: it asks for" in told and not marker.exists()


def test_every_format_is_found_and_named():
  assert {"albef", "albef_tasks", "augreg", "hf_bert", "hf_vit", "timm_vit"} <= set(
    formats.names()
  )
  assert "native" not in formats.names() and "reader" not in formats.names()
  assert set(formats.names()) <= {*initial.formats()}


def test_our_folders_keep_every_kind_of_leaf(tmp_path):
  tree = {"a": {"b": np.float32(0.07), "c": np.arange(3, dtype=np.int32)}}
  fields = dict(params=tree, memory={}, prefix="bert.", config=dict(x=[1, None]))
  native.save(tmp_path / "it", native.Checkpoint("hf_bert", fields))
  got = native.load(tmp_path / "it")
  assert got.format == "hf_bert" and got.fields.keys() == fields.keys()
  assert got.fields["memory"] == {} and got.fields["config"] == dict(x=[1, None])
  for path, leaf in tree_lib.flatten(tree).items():
    x = tree_lib.flatten(got.fields["params"])[path]
    assert x.dtype == leaf.dtype and x.tobytes() == leaf.tobytes()
  with pytest.raises(ValueError, match="no plain data"):
    native.save(tmp_path / "x", native.Checkpoint(None, dict(odd={1, 2})))


def test_a_run_is_written_in_the_official_layout(tmp_path):
  """Parameters, averages and queues of its newest checkpoint."""
  path = REFERENCE / "albef/weights.safetensors"
  loaded = albef.load(path, num_heads_image=4, num_heads_text=4)
  state = step_lib.TrainState(
    step=np.int32(7),
    params=loaded.params,
    opt_state={"mu": {"x": np.zeros(2, np.float32)}},
    ema=loaded.ema,
    memory=loaded.memory,
  )
  checkpoints = checkpoint.Checkpoints(tmp_path / "run" / "checkpoints")
  checkpoints.save(7, jax.tree.map(jnp.asarray, state), {"position": 1}, {})
  checkpoints.finish()
  out = tmp_path / "ALBEF.pth"
  run("--weights", tmp_path / "run", "--to", "albef", "--out", out, "--key", "model")
  want, got = reader.load(path), reader.load(out)
  assert got.keys() == want.keys()
  for key, x in want.items():
    assert got[key].dtype == x.dtype and got[key].tobytes() == x.tobytes(), key


def test_a_tower_of_a_run_is_written_for_transformers(tmp_path):
  given = config_file.load(str(ROOT / "configs" / "albef.py") + ":tiny")
  path = str(REFERENCE / "tokenizers" / "albef_vocab.txt")
  given.tokenizer = dict(type="wordpiece", path=path, length=16, sep=False)
  config = config_lib.run(given)
  words = build.tokenizer(config.tokenizer, None, tmp_path)
  clock = clock_lib.of(config, 100)
  made = build.pretrainer(config, vocab=words.vocab, length=16, time=clock)
  shapes = step_lib.abstract_params(made, batch_lib.spec(2, 32, 16))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)
  state = dict(params=params, step=np.int32(1))
  checkpoints = checkpoint.Checkpoints(tmp_path / "run" / "checkpoints")
  checkpoints.save(1, jax.tree.map(jnp.asarray, state), {}, {})
  checkpoints.finish()
  (tmp_path / "run" / cli.CONFIG_FILE).write_text(config_file.to_json(given))
  for name, tower in (("hf_vit", "image"), ("hf_bert", "text")):
    run("--weights", tmp_path / "run", "--to", name, "--out", tmp_path / name)
    got = formats.load(tmp_path / name).fields["params"]["model"][tower]
    jax.tree.map(np.testing.assert_array_equal, got, params["model"][tower])


def test_a_dual_encoder_of_a_run_is_written_for_transformers(tmp_path):
  """config.json has the ids of the run's own vocabulary: CLIP is pooled at the end."""
  given = config_file.load(str(ROOT / "configs" / "clip.py") + ":tiny")
  config = config_lib.run(given)
  workdir = tmp_path / "run"
  workdir.mkdir()
  # The vocabulary that the run made of its captions lies in its workdir.
  words = build.tokenizer(config.tokenizer, build.source(config.data.source), workdir)
  made = build.pretrainer(
    config, vocab=words.vocab, length=words.length, time=clock_lib.of(config, 300)
  )
  shapes = step_lib.abstract_params(made, batch_lib.spec(2, 32, words.length))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)
  checkpoints = checkpoint.Checkpoints(workdir / "checkpoints")
  state = dict(params=jax.tree.map(jnp.asarray, params), step=jnp.int32(1))
  checkpoints.save(1, state, {}, {})
  checkpoints.finish()
  (workdir / cli.CONFIG_FILE).write_text(config_file.to_json(given))
  run("--weights", workdir, "--to", "hf_dual", "--out", tmp_path / "hf")
  text = json.loads((tmp_path / "hf" / "config.json").read_text())["text_config"]
  ids, mask = words.encode(["a small red circle"])
  assert text["eos_token_id"] == ids[0, mask[0].sum() - 1] == words.vocab.sep
  assert text["bos_token_id"] == ids[0, 0]
  # To transformers an end of 2 means that the highest id is the end, as in old files.
  assert text["eos_token_id"] != 2
  assert text["vocab_size"] == words.vocab.size
  got = formats.load(tmp_path / "hf", "hf_dual").fields["params"]
  jax.tree.map(np.testing.assert_array_equal, got["model"], params["model"])


def test_formats_of_parameters_alone(tmp_path, monkeypatch):
  """A format whose `load` returns a tree, and whose `save` takes one."""
  tree = {"model": {"x": np.arange(3.0)}}
  plain = types.ModuleType("plain")
  plain.load = lambda path, *, key=None: tree
  written = {}
  plain.save = lambda path, params, *, key=None: written.update(params)
  monkeypatch.setattr(formats, "_module", lambda name: plain)
  loaded = formats.load(tmp_path, "plain")
  assert loaded.fields == {"params": tree}
  native.save(tmp_path / "ours", loaded)
  formats.save(tmp_path / "out", native.load(tmp_path / "ours"), "plain", {"key": "a"})
  np.testing.assert_array_equal(written["model"]["x"], tree["model"]["x"])
  with pytest.raises(ValueError, match="plain: no option 'heads'; it has key"):
    formats.load(tmp_path, "plain", {"heads": 3})
  run_ = native.Checkpoint(None, dict(params=tree, ema=tree, memory={}))
  assert formats.save(tmp_path / "out", run_, "plain") == ["ema"]
