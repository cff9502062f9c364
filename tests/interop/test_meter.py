"""Official METER checkpoints: into our trees and back.

What a model computes with them is in tests/test_parity_meter.py.
"""

import pathlib

import jax
import numpy as np
import pytest

from vlp_jax.interop import meter
from vlp_jax.interop import reader
from vlp_jax.ops import posembed

REFERENCE = pathlib.Path(__file__).parents[1] / "reference"
FILES = {
  name: REFERENCE / name / "weights.safetensors" for name in ("meter", "meter_bert")
}
HEADS = dict(num_heads_text=4, num_heads_fusion=4)


@pytest.fixture(scope="module", params=list(FILES))
def case(request):
  path = FILES[request.param]
  return path, meter.load(path, **HEADS)


def abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.mark.parametrize(
  "suffix, key", [(".ckpt", "state_dict"), (".safetensors", None)]
)
def test_round_trip_is_bit_exact(case, tmp_path, suffix, key):
  path, checkpoint = case
  written = tmp_path / f"meter{suffix}"
  meter.save(written, checkpoint, key=key)
  want, got = reader.load(path), reader.load(written)
  assert got.keys() == want.keys()
  for name, x in want.items():
    assert (got[name].shape, got[name].dtype) == (x.shape, x.dtype), name
    assert got[name].tobytes() == x.tobytes(), name


@pytest.mark.parametrize(
  "name, head", [("meter_vqa", "vqa_scores"), ("meter_nlvr2", "pair_classify")]
)
def test_heads_of_tasks_go_both_ways(name, head):
  path = REFERENCE / name / "weights.safetensors"
  checkpoint = meter.load(path, **HEADS)
  assert f"objectives_{head}" in checkpoint.params
  want = reader.load(path)
  got = meter.export(checkpoint.params) | checkpoint.unused
  assert got.keys() == want.keys()
  for key, x in want.items():
    np.testing.assert_array_equal(got[key], x, err_msg=key)


def test_trees_hold_their_tensors(case):
  path, checkpoint = case
  theirs, model = reader.load(path), checkpoint.params["model"]
  key = theirs["cross_modal_image_layers.1.crossattention.self.key.weight"]
  blocks = model["fusion"]["blocks"]["image"]
  np.testing.assert_array_equal(
    blocks["cross"]["key"]["kernel"][1], key.T.reshape(32, 4, 8)
  )
  conv = theirs["vit_model.visual.conv1.weight"]
  np.testing.assert_array_equal(
    model["image"]["patch"]["kernel"], conv.transpose(2, 3, 1, 0).reshape(768, -1)
  )
  assert set(checkpoint.unused) == {
    "vit_model.positional_embedding",
    "vit_model.ln_final.weight",
    "vit_model.ln_final.bias",
    "text_transformer.pooler.dense.weight",
    "text_transformer.pooler.dense.bias",
  }


def test_init_resizes_positions(case):
  path, checkpoint = case
  shapes = abstract(checkpoint.params)
  table = checkpoint.params["model"]["image"]["posemb"]
  shapes["model"]["image"]["posemb"] = jax.ShapeDtypeStruct(
    (37, table.shape[1]), np.float32
  )
  got = meter.init(shapes, path=path)["model"]["image"]["posemb"]
  np.testing.assert_array_equal(got, posembed.resize_posembed(table, 6))


def test_init_lists_what_does_not_fit(case):
  path, checkpoint = case
  shapes = abstract(checkpoint.params)
  del shapes["objectives_itm"]
  shapes["model"]["extra"] = jax.ShapeDtypeStruct((3,), np.float32)
  shapes["model"]["text"]["position"]["embedding"] = jax.ShapeDtypeStruct(
    (30, 32), np.float32
  )
  with pytest.raises(ValueError) as e:
    meter.init(shapes, path=path)
  for text in ("itm_score.fc.weight", "model/extra", "say model.text.length=24"):
    assert text in str(e.value)
  del shapes["model"]["fusion"]
  with pytest.raises(ValueError, match="not of METER's kind.*model/fusion"):
    meter.init(shapes, path=path)


def test_load_refuses_what_is_not_meter(tmp_path):
  path = tmp_path / "other.safetensors"
  reader.save(path, {"logit_scale": np.float32(1.0)})
  with pytest.raises(ValueError, match=r"other.* is no METER checkpoint"):
    meter.load(path)
  with pytest.raises(ValueError, match="say num_heads_text="):
    meter.load(FILES["meter"])
