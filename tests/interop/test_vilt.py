"""Official ViLT checkpoints: into our trees and back.

What a model computes with them is in tests/test_parity_vilt.py.
"""

import pathlib

import jax
import numpy as np
import pytest

from vlp_jax.interop import reader
from vlp_jax.interop import vilt
from vlp_jax.ops import tree as tree_lib

REFERENCE = pathlib.Path(__file__).parents[1] / "reference"
PATH = REFERENCE / "vilt" / "weights.safetensors"
TASKS = {
  "vilt_vqa": "vqa_scores",
  "vilt_nlvr2": "pair_classify",
  "vilt_irtr": "text_rank",
}


@pytest.fixture(scope="module")
def params():
  return vilt.load(PATH, num_heads=4).params


def abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.mark.parametrize(
  "suffix, key", [(".ckpt", "state_dict"), (".safetensors", None)]
)
def test_round_trip_is_bit_exact(params, tmp_path, suffix, key):
  path = tmp_path / f"vilt{suffix}"
  vilt.save(path, vilt.Checkpoint(params), key=key)
  want, got = reader.load(PATH), reader.load(path)
  assert got.keys() == want.keys()
  for name, x in want.items():
    assert (got[name].shape, got[name].dtype) == (x.shape, x.dtype), name
    assert got[name].tobytes() == x.tobytes(), name


@pytest.mark.parametrize("name", TASKS)
def test_heads_of_tasks_go_both_ways(name):
  path = REFERENCE / name / "weights.safetensors"
  params = vilt.load(path, num_heads=4).params
  assert f"objectives_{TASKS[name]}" in params
  want, got = reader.load(path), vilt.export(params)
  assert got.keys() == want.keys()
  for key, x in want.items():
    np.testing.assert_array_equal(got[key], x, err_msg=key)


def test_trees_hold_their_tensors(params):
  theirs, model = reader.load(PATH), params["model"]
  qkv = theirs["transformer.blocks.2.attn.qkv.weight"]
  np.testing.assert_array_equal(
    model["fusion"]["blocks"]["attn"]["key"]["kernel"][2],
    qkv[32:64].T.reshape(32, 4, 8),
  )
  np.testing.assert_array_equal(
    model["text"]["word"]["embedding"],
    theirs["text_embeddings.word_embeddings.weight"],
  )


def test_init_gives_the_parameters(params):
  got = vilt.init(abstract(params), path=PATH)
  jax.tree.map(np.testing.assert_array_equal, got, params)


def test_init_of_a_model_without_a_head(params):
  shapes = abstract({"model": params["model"]})
  got = vilt.init(shapes, path=PATH, skip=[r"(mlm|itm)_score\..*"])
  assert tree_lib.flatten(got).keys() == tree_lib.flatten(shapes).keys()


def test_init_lists_what_does_not_fit(params):
  shapes = abstract(params)
  del shapes["objectives_itm"]
  shapes["model"]["image"]["posemb"] = jax.ShapeDtypeStruct((26, 32), np.float32)
  with pytest.raises(ValueError) as e:
    vilt.init(shapes, path=PATH)
  for text in ("itm_score.fc.weight", "say model.image.table_res=4 times"):
    assert text in str(e.value)
  del shapes["model"]["fusion"]
  with pytest.raises(ValueError, match="not of ViLT's kind.*model/fusion"):
    vilt.init(shapes, path=PATH)


def test_load_refuses_what_is_not_vilt(tmp_path):
  path = tmp_path / "other.safetensors"
  reader.save(path, {"logit_scale": np.float32(1.0)})
  with pytest.raises(ValueError, match=r"other.* is no ViLT checkpoint"):
    vilt.load(path)
  with pytest.raises(ValueError, match="say num_heads="):
    vilt.load(PATH)


def test_what_tasks_begin_with(params):
  """The rank is the matching head's "match"; a second image is as the first."""
  shapes = abstract(params)
  del shapes["objectives_itm"], shapes["objectives_mlm"]
  width = params["model"]["fusion"]["type"]["embedding"].shape[1]
  leaf = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)
  shapes["model"]["fusion"]["type"]["embedding"] = leaf(3, width)
  shapes["objectives_text_rank"] = {"head": dict(kernel=leaf(width, 1), bias=leaf(1))}
  got = vilt.init(shapes, path=PATH, skip=[r"(mlm|itm)_score\..*"])
  theirs = reader.load(PATH)
  rank = got["objectives_text_rank"]["head"]
  np.testing.assert_array_equal(rank["kernel"].T, theirs["itm_score.fc.weight"][1:])
  np.testing.assert_array_equal(rank["bias"], theirs["itm_score.fc.bias"][1:])
  types, own = got["model"]["fusion"]["type"]["embedding"], params["model"]["fusion"]
  np.testing.assert_array_equal(types[:2], own["type"]["embedding"])
  np.testing.assert_array_equal(types[2], types[1])
