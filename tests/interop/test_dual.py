"""Checkpoints of CLIP and SigLIP: into our trees and back, and what is refused.

What models compute with them is in tests/test_parity_clip.py.
"""

import json
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest

from vlp_jax import build
from vlp_jax.data import vocab as vocab_lib
from vlp_jax.interop import clip
from vlp_jax.interop import hf_dual
from vlp_jax.interop import initial
from vlp_jax.interop import open_clip
from vlp_jax.interop import reader
from vlp_jax.ops import posembed
from vlp_jax.ops import tree as tree_lib

REFERENCE = pathlib.Path(__file__).parents[1] / "reference"
ARCHIVE = REFERENCE / "clip_vit" / "model_jit.pt"
SIGLIP = REFERENCE / "openclip_siglip" / "weights.safetensors"


def same(got, want):
  assert got.keys() == want.keys()
  for name, x in want.items():
    assert (got[name].shape, got[name].dtype) == (x.shape, x.dtype), name
    assert got[name].tobytes() == x.tobytes(), name


def float32(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


def abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), tree)


def folder_model(folder, image=None, text=None):
  """The model of a folder's config.json, with other fields of its towers."""
  words = json.loads((folder / "config.json").read_text())["text_config"]
  vocab = vocab_lib.Vocab(
    size=words["vocab_size"],
    cls=words["bos_token_id"],
    sep=words["eos_token_id"],
    pad=words["pad_token_id"],
    unk=0,
    mask=None,
  )
  spec = hf_dual.model_spec(folder)
  spec["image"] |= image or {}
  spec["text"] |= text or {}
  return build.model(spec, vocab=vocab, length=spec["text"]["length"])


# --- OpenAI ---------------------------------------------------------------------------


def test_a_torchscript_archive_is_read_as_its_state_dict():
  tensors = reader.load(ARCHIVE)
  assert len(tensors) == 65
  assert tensors["visual.conv1.weight"].dtype == np.float16
  assert tensors["visual.conv1.weight"].shape == (128, 3, 8, 8)
  assert tensors["input_resolution"] == 32 and tensors["context_length"] == 16
  assert not tensors["token_embedding.weight"].flags.writeable


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_openai_round_trip_is_bit_exact(tmp_path, suffix):
  params = clip.load(ARCHIVE)
  clip.save(tmp_path / f"clip{suffix}", params)
  same(reader.load(tmp_path / f"clip{suffix}"), reader.load(ARCHIVE))


def test_weights_come_back_from_float32(tmp_path):
  clip.save(tmp_path / "clip.pt", float32(clip.load(ARCHIVE)), openai=True)
  same(reader.load(tmp_path / "clip.pt"), reader.load(ARCHIVE))


def test_open_clip_has_the_same_names_less_the_numbers(tmp_path):
  params = float32(clip.load(ARCHIVE))
  clip.save(tmp_path / "clip.pt", params, key="state_dict")
  tensors = reader.load(tmp_path / "clip.pt")
  numbers = {"input_resolution", "context_length", "vocab_size"}
  assert tensors.keys() == reader.load(ARCHIVE).keys() - numbers
  again = clip.load(tmp_path / "clip.pt")
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_each_layer_is_in_its_place():
  theirs, params = reader.load(ARCHIVE), clip.load(ARCHIVE)["model"]
  text, image = params["text"], params["image"]
  fused = theirs["transformer.resblocks.1.attn.in_proj_weight"]
  np.testing.assert_array_equal(
    text["blocks"]["attn"]["value"]["kernel"][1].reshape(128, 128), fused[256:].T
  )
  np.testing.assert_array_equal(
    image["patch"]["kernel"][3 * 9 + 1], (theirs["visual.conv1.weight"][:, 1, 1, 1])
  )
  np.testing.assert_array_equal(
    params["text_proj"]["kernel"], theirs["text_projection"]
  )
  assert len(tree_lib.flatten(params)) == 46


def test_init_resizes_positions_and_checks_the_layers():
  params = clip.load(ARCHIVE)
  shapes = abstract(params)
  assert all(
    x.dtype == np.float32 for x in jax.tree.leaves(clip.init(shapes, path=ARCHIVE))
  )
  shapes["model"]["image"]["posemb"] = jax.ShapeDtypeStruct((37, 128), np.float32)
  got = clip.init(shapes, path=ARCHIVE)["model"]["image"]["posemb"]
  want = posembed.resize_posembed(params["model"]["image"]["posemb"], 6)
  np.testing.assert_array_equal(got, want)
  tower = types.SimpleNamespace(act="gelu", norm_eps=1e-6)
  model = types.SimpleNamespace(image=tower, text=tower)
  with pytest.raises(ValueError) as e:
    initial.load(dict(type="clip", path=str(ARCHIVE)), shapes, model=model)
  for text in (
    "model.image.act='gelu', but the checkpoint wants 'quick_gelu'",
    "model.text.norm_eps=1e-06, but the checkpoint wants 1e-05",
  ):
    assert text in str(e.value)


def test_open_clip_resizes_with_antialiasing(tmp_path):
  params = float32(clip.load(ARCHIVE))
  clip.save(tmp_path / "clip.pt", params)
  shapes = abstract(params)
  shapes["model"]["image"]["posemb"] = jax.ShapeDtypeStruct((10, 128), np.float32)
  got = clip.init(shapes, path=tmp_path / "clip.pt")["model"]["image"]["posemb"]
  table = params["model"]["image"]["posemb"]
  want = posembed.resize_posembed(table, 3, how="antialiased")
  np.testing.assert_array_equal(got, want)
  assert np.abs(want - posembed.resize_posembed(table, 3)).max() > 1e-3


def test_every_tensor_is_accounted_for(tmp_path):
  tensors = dict(reader.load(ARCHIVE))
  del tensors["visual.proj"]
  tensors["logit_bias"] = np.float32(0.0)
  tensors["context_length"] = np.int64(77)
  reader.save(tmp_path / "clip.safetensors", tensors)
  with pytest.raises(ValueError) as e:
    clip.load(tmp_path / "clip.safetensors")
  for text in (
    "unknown tensors (1):\n    logit_bias []",
    "missing tensors (1):\n    visual.proj",
    "constants of another value (1):\n    context_length",
  ):
    assert text in str(e.value)
  with pytest.raises(ValueError, match=r"weights.safetensors is not an? .*CLIP"):
    clip.load(SIGLIP)


# --- open_clip ------------------------------------------------------------------------


def test_siglip_round_trip_is_bit_exact(tmp_path):
  params = open_clip.load(SIGLIP, num_heads_image=4, num_heads_text=4)
  open_clip.save(tmp_path / "siglip.safetensors", params)
  same(reader.load(tmp_path / "siglip.safetensors"), reader.load(SIGLIP))


def test_heads_that_no_tensor_tells_are_asked_for():
  with pytest.raises(ValueError, match="say num_heads_image="):
    open_clip.load(SIGLIP)


def test_siglip_init_resizes_a_table_without_a_class_token():
  params = open_clip.load(SIGLIP, num_heads_image=4, num_heads_text=4)
  shapes = abstract(params)
  shapes["model"]["image"]["posemb"] = jax.ShapeDtypeStruct((36, 32), np.float32)
  got = open_clip.init(shapes, path=SIGLIP)["model"]["image"]["posemb"]
  table = params["model"]["image"]["posemb"]
  want = posembed.resize_posembed(table, 6, prefix=0)
  np.testing.assert_array_equal(got, want)


# --- transformers ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hf_clip", "hf_siglip", "hf_siglip2"])
def test_folder_round_trip_is_bit_exact(tmp_path, name):
  folder = REFERENCE / name
  theirs = json.loads((folder / "config.json").read_text())
  loaded = hf_dual.load(folder)
  made = hf_dual.of_model(folder_model(folder), loaded.params)
  hf_dual.save(tmp_path / "out", made)
  weights = "model.safetensors"
  same(reader.load(tmp_path / "out" / weights), reader.load(folder / weights))
  assert hf_dual.model_spec(tmp_path / "out") == hf_dual.model_spec(folder)
  ours = json.loads((tmp_path / "out" / "config.json").read_text())
  # What a class does not read: who wrote the file, how weights were drawn.
  unread = ("transformers_version", "logit_scale_init_value")
  assert ours.keys() == theirs.keys() - set(unread)
  for key in ("architectures", "model_type", "dtype"):
    assert ours[key] == theirs[key], key
  for section in ("text_config", "vision_config"):
    for key, value in theirs[section].items():
      # CLIPModel reads the outer projection_dim alone.
      if not key.startswith("initializer") and key != "projection_dim":
        assert ours[section][key] == value, (section, key)


def test_a_folder_is_checked_against_the_model(tmp_path):
  folder = REFERENCE / "hf_clip"
  shapes = abstract(hf_dual.load(folder).params)
  spec = dict(type="hf_dual", path=str(folder))
  got = initial.load(spec, shapes, model=folder_model(folder))
  assert tree_lib.flatten(got).keys() == tree_lib.flatten(shapes).keys()
  model = folder_model(folder, dict(norm_eps=1e-6), dict(act="gelu"))
  with pytest.raises(ValueError) as e:
    initial.load(spec, shapes, model=model)
  assert "model.text.act='gelu', but the checkpoint wants 'quick_gelu'" in str(e.value)
  assert "model.image.norm_eps=1e-06, but the checkpoint wants 1e-05" in str(e.value)
  # No CLIPModel's text sees what comes after.
  model = folder_model(folder, text=dict(attention="bidirectional"))
  with pytest.raises(ValueError, match="was made with other layers"):
    hf_dual.of_model(model, hf_dual.load(folder).params)


def test_folders_that_are_none(tmp_path):
  with pytest.raises(FileNotFoundError, match="no directory"):
    hf_dual.load(tmp_path / "none")
  with pytest.raises(FileNotFoundError, match=r"no config\.json"):
    hf_dual.load(tmp_path)
  config = tmp_path / "config.json"
  config.write_text('{"model_type": "bert"}')
  with pytest.raises(
    ValueError, match="model_type='bert': want one of clip, siglip, siglip2"
  ):
    hf_dual.model_spec(tmp_path)
  config.write_text('{"model_type": "clip", "text_config": {"hidden_act": "mish"}}')
  with pytest.raises(ValueError, match=r"text_config: hidden_act='mish'"):
    hf_dual.model_spec(tmp_path)
  shutil.copy(REFERENCE / "hf_clip" / "config.json", config)
  with pytest.raises(FileNotFoundError, match="has no weights: want model.safetensors"):
    hf_dual.load(tmp_path)


def test_what_config_json_leaves_out_is_the_default_of_the_class(tmp_path):
  (tmp_path / "config.json").write_text('{"model_type": "clip"}')
  spec = hf_dual.model_spec(tmp_path)
  assert (spec["embed_dim"], spec["image"]["patch"], spec["text"]["width"]) == (
    (512, 32, 512)
  )
  (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
  spec = hf_dual.model_spec(tmp_path)
  assert (spec["embed_dim"], spec["image"]["patch"]) == (768, 16)
  assert spec["image"]["act"] == "gelu_tanh"
