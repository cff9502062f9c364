"""Official ALBEF checkpoints: into our trees and back.

What a model computes with them is in tests/test_parity_albef.py.
"""

import pathlib

import jax
import numpy as np
import pytest

from vlp_jax.interop import albef
from vlp_jax.interop import reader
from vlp_jax.ops import posembed
from vlp_jax.ops import tree as tree_lib

WEIGHTS = (
  pathlib.Path(__file__).parents[1] / "reference" / "albef" / "weights.safetensors"
)
HEADS = dict(num_heads_image=4, num_heads_text=4, fusion_layer=2)


@pytest.fixture(scope="module")
def checkpoint():
  return albef.load(WEIGHTS, **HEADS)


def abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def test_trees_hold_their_tensors(checkpoint):
  theirs = reader.load(WEIGHTS)
  params, ema = checkpoint.params["model"], checkpoint.ema["model"]
  for tree, m in ((params, ""), (ema, "_m")):
    np.testing.assert_array_equal(
      tree["text"]["word"]["embedding"],
      theirs[f"text_encoder{m}.bert.embeddings.word_embeddings.weight"],
    )
    np.testing.assert_array_equal(
      tree["image_proj"]["kernel"], theirs[f"vision_proj{m}.weight"].T
    )
    # Layer 3 of BERT is layer 1 of the fusion stack.
    key = f"text_encoder{m}.bert.encoder.layer.3.crossattention.self.key.weight"
    np.testing.assert_array_equal(
      tree["fusion"]["blocks"]["cross"]["key"]["kernel"][1],
      theirs[key].T.reshape(48, 4, 12),
    )
    value = theirs[f"visual_encoder{m}.blocks.1.attn.qkv.bias"][96:]
    np.testing.assert_array_equal(
      tree["image"]["blocks"]["attn"]["value"]["bias"][1], value.reshape(4, 12)
    )
  memory = checkpoint.memory["objectives_itc"]
  np.testing.assert_array_equal(memory["image_queue"], theirs["image_queue"].T)
  assert memory["ptr"] == 4 and memory["ptr"].dtype == np.int32
  assert memory["id_queue"].tolist() == [-1] * 8


def test_averages_have_the_tree_of_the_parameters(checkpoint):
  shapes = lambda tree: {k: x.shape for k, x in tree_lib.flatten(tree).items()}
  assert shapes(checkpoint.ema) == shapes(checkpoint.params)
  live, average = tree_lib.flatten(checkpoint.params), tree_lib.flatten(checkpoint.ema)
  for path, leaf in live.items():
    assert np.array_equal(leaf, average[path]) == (path in albef.NO_MOMENTUM), path


@pytest.mark.parametrize("suffix, key", [(".pth", "model"), (".safetensors", None)])
def test_round_trip_is_bit_exact(checkpoint, tmp_path, suffix, key):
  path = tmp_path / f"albef{suffix}"
  albef.save(path, checkpoint, key=key)
  want, got = reader.load(WEIGHTS), reader.load(path)
  assert got.keys() == want.keys()
  for name, x in want.items():
    assert (got[name].shape, got[name].dtype) == (x.shape, x.dtype), name
    assert got[name].tobytes() == x.tobytes(), name
  if suffix == ".pth":
    words = "text_encoder.bert.embeddings.word_embeddings.weight"
    decoder = "text_encoder.cls.predictions.decoder.weight"
    assert np.shares_memory(got[words], got[decoder])
  again = albef.load(path, **HEADS)
  for ours, theirs in ((checkpoint.params, again.params), (checkpoint.ema, again.ema)):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("momentum", [False, True])
def test_export_has_the_names_of_the_parameters(checkpoint, momentum):
  tree = checkpoint.ema if momentum else checkpoint.params
  got = albef.export(tree, momentum=momentum)
  want = reader.load(WEIGHTS)
  queues = ("image_queue", "text_queue", "queue_ptr")
  is_copy = lambda name: name.split(".")[0].endswith("_m")
  names = {k for k in want if k not in queues and is_copy(k) == momentum}
  assert got.keys() == names
  for name in names:
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_init_gives_the_parameters(checkpoint):
  got = albef.init(abstract(checkpoint.params), path=WEIGHTS)
  jax.tree.map(np.testing.assert_array_equal, got, checkpoint.params)


def test_init_resizes_positions_and_casts(checkpoint):
  shapes = abstract(checkpoint.params)
  shapes["model"]["image"]["posemb"] = jax.ShapeDtypeStruct((37, 48), np.float32)
  shapes["model"]["temp"] = jax.ShapeDtypeStruct((), np.float16)
  got = albef.init(shapes, path=WEIGHTS)["model"]
  want = posembed.resize_posembed(checkpoint.params["model"]["image"]["posemb"], 6)
  np.testing.assert_array_equal(got["image"]["posemb"], want)
  assert got["temp"].dtype == np.float16


def test_init_lists_what_does_not_fit(checkpoint):
  shapes = abstract(checkpoint.params)
  wanted = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)
  shapes["model"]["image"]["posemb"] = wanted(12, 48)
  shapes["model"]["text"]["position"]["embedding"] = wanted(30, 48)
  shapes["model"]["text"]["word"]["embedding"] = wanted(300, 48)
  shapes["model"]["extra"] = wanted(3)
  del shapes["objectives_itm"]
  with pytest.raises(ValueError) as e:
    albef.init(shapes, path=WEIGHTS)
  for text in (
    str(WEIGHTS),
    "posemb: file [17, 48], model [12, 48]",
    "say model.text.length=40 (not 30)",
    "embedding: file [200, 48], model [300, 48]",
    "model/extra",
    "itm_head.weight -> objectives_itm/head/kernel",
  ):
    assert text in str(e.value)


def test_init_of_a_model_without_mlm(checkpoint):
  shapes = abstract(checkpoint.params)
  del shapes["objectives_mlm"]
  got = albef.init(shapes, path=WEIGHTS, skip=[r"text_encoder\.cls\..*"])
  assert tree_lib.flatten(got).keys() == tree_lib.flatten(shapes).keys()


def test_init_of_a_model_with_other_layers(checkpoint):
  cut = lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
  shapes = abstract(checkpoint.params)
  shapes["model"]["fusion"] = jax.tree.map(cut, shapes["model"]["fusion"])
  with pytest.raises(ValueError, match="unknown tensors.*\n.*encoder.layer.3"):
    albef.init(shapes, path=WEIGHTS)
  del shapes["model"]["fusion"]
  with pytest.raises(ValueError, match="not of ALBEF's kind.*model/fusion"):
    albef.init(shapes, path=WEIGHTS)


def test_load_refuses_what_is_not_albef(tmp_path):
  path = tmp_path / "other.safetensors"
  reader.save(path, {"logit_scale": np.float32(1.0)})
  with pytest.raises(ValueError, match=r"other.* is no ALBEF pretraining checkpoint"):
    albef.load(path, **HEADS)
  with pytest.raises(ValueError, match="fusion_layer=4, but .* has 4 layers"):
    albef.load(WEIGHTS, **(HEADS | dict(fusion_layer=4)))
  with pytest.raises(ValueError, match=r"layer\.2\.crossattention.*"):
    albef.load(WEIGHTS, **(HEADS | dict(fusion_layer=3)))
  with pytest.raises(ValueError, match=r"attention\.self\.query\.weight \[48, 48\]"):
    albef.load(WEIGHTS, **(HEADS | dict(num_heads_text=5)))
