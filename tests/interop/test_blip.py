"""Official BLIP and CoCa checkpoints: into our trees and back.

What a model computes with them is in tests/test_parity_blip*.py and _coca.py.
"""

import pathlib
import re

import jax
import numpy as np
import pytest

from vlp_jax.interop import blip
from vlp_jax.interop import coca
from vlp_jax.interop import formats
from vlp_jax.interop import reader
from vlp_jax.ops import posembed
from vlp_jax.ops import tree as tree_lib

REFERENCE = pathlib.Path(__file__).parents[1] / "reference"
HEADS = dict(num_heads_image=4, num_heads_text=4)
FILES = {
  "pretrain": "weights.safetensors",
  "caption": "checkpoint.pth",
  "retrieval": "weights.safetensors",
  "itm": "weights.safetensors",
  "vqa": "weights.safetensors",
  "nlvr": "weights.safetensors",
}


def file_of(kind):
  return REFERENCE / f"blip_{kind}" / FILES[kind]


def abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def same(got, want):
  assert got.keys() == want.keys()
  for name, x in want.items():
    assert (got[name].shape, got[name].dtype) == (x.shape, x.dtype), name
    assert got[name].tobytes() == x.tobytes(), name


@pytest.mark.parametrize("kind", FILES)
def test_round_trip_is_bit_exact(kind, tmp_path):
  loaded = blip.load(file_of(kind), **HEADS)
  blip.save(tmp_path / "blip.pth", loaded, key="model")
  got = reader.load(tmp_path / "blip.pth")
  same(got, reader.load(file_of(kind)))
  words = "text_decoder.bert.embeddings.word_embeddings.weight"
  if kind == "pretrain":
    # Written once, as one tensor.
    assert np.shares_memory(got["text_encoder" + words[17:]], got[words])


@pytest.mark.parametrize("kind", FILES)
def test_the_format_is_found(kind):
  assert formats.find(file_of(kind)) == "blip"


def test_trees_hold_their_tensors():
  theirs = reader.load(file_of("pretrain"))
  loaded = blip.load(file_of("pretrain"), **HEADS)
  blocks = loaded.params["model"]["fusion"]["blocks"]
  for ours, prefix in (
    ("attn", "text_encoder."),
    ("attn_causal", "text_decoder.bert."),
  ):
    query = theirs[f"{prefix}encoder.layer.1.attention.self.query.weight"]
    want = query.T.reshape(48, 4, 12)
    np.testing.assert_array_equal(blocks[ours]["query"]["kernel"][1], want)
  live, ema = tree_lib.flatten(loaded.params), tree_lib.flatten(loaded.ema)
  assert live.keys() == ema.keys()
  # The decoder has no momentum copy: its averages are the live weights.
  path = "model/fusion/blocks/attn_causal/query/kernel"
  assert np.array_equal(live[path], ema[path])
  path = "model/fusion/blocks/attn/query/kernel"
  assert not np.array_equal(live[path], ema[path])


def test_a_captioner_from_a_pretraining_file():
  """Positions are resized; what the captioner has not is named by `skip`."""
  shapes = abstract(blip.load(file_of("pretrain"), **HEADS).params)
  model = shapes["model"]
  for name in ("image_proj", "text_proj", "temp"):
    del model[name]
  for name in ("attn", "norm_attn"):
    del model["fusion"]["blocks"][name]
  del shapes["objectives_itm"]
  model["image"]["posemb"] = jax.ShapeDtypeStruct((37, 48), np.float32)
  skip = [r"text_encoder\..*", r"(vision|text)_proj\..*", r"itm_head\..*", "temp"]
  got = blip.init(shapes, path=file_of("pretrain"), skip=skip)
  theirs = blip.load(file_of("pretrain"), **HEADS).params
  want = posembed.resize_posembed(theirs["model"]["image"]["posemb"], 6)
  np.testing.assert_array_equal(got["model"]["image"]["posemb"], want)
  jax.tree.map(
    np.testing.assert_array_equal, got["objectives_lm"], theirs["objectives_lm"]
  )


def test_tied_tensors_that_differ_are_told(tmp_path):
  tensors = dict(reader.load(file_of("pretrain")))
  name = "text_decoder.bert.encoder.layer.0.crossattention.self.key.weight"
  tensors[name] = tensors[name] + 1
  reader.save(tmp_path / "odd.safetensors", tensors)
  with pytest.raises(ValueError, match=f"tied tensors that differ.*\n.*{name}"):
    blip.load(tmp_path / "odd.safetensors", **HEADS)


def test_what_is_not_blip_is_told(tmp_path):
  path = tmp_path / "other.safetensors"
  reader.save(path, {"logit_scale": np.ones(1, np.float32)})
  with pytest.raises(ValueError, match="other.* is no BLIP checkpoint"):
    blip.load(path, **HEADS)
  with pytest.raises(ValueError, match="no CoCa checkpoint of open_clip"):
    coca.load(path, **HEADS, num_heads_pool=4)
  params = blip.load(file_of("caption"), **HEADS).params
  with pytest.raises(ValueError, match="not of CoCa's kind"):
    coca.export(params)
  with pytest.raises(ValueError, match="not of BLIP's kind"):
    blip.export({"model": {"image": params["model"]["image"]}})


COCA = REFERENCE / "openclip_coca" / "checkpoint.pt"


@pytest.mark.parametrize("suffix, key", [(".pt", "state_dict"), (".safetensors", None)])
def test_coca_round_trip_is_bit_exact(tmp_path, suffix, key):
  loaded = coca.load(COCA, **HEADS, num_heads_pool=4)
  path = tmp_path / f"coca{suffix}"
  coca.save(path, loaded, key=key)
  same(reader.load(path), reader.load(COCA))
  assert formats.find(COCA) == "coca"


def test_coca_init_gives_the_parameters():
  params = coca.load(COCA, **HEADS, num_heads_pool=4).params
  got = coca.init(abstract(params), path=COCA)
  jax.tree.map(np.testing.assert_array_equal, got, params)


def test_coca_of_another_width_than_its_pooling(tmp_path):
  """coca_ViT-L-14: query, key and value of the pooling are tensors of their own."""
  params = coca.load(COCA, **HEADS, num_heads_pool=4).params
  tensors = dict(coca.export(params))
  fused = tensors.pop("visual.attn_pool.attn.in_proj_weight")
  for name, x in zip("qkv", np.split(fused, 3), strict=True):
    wide = x if name == "q" else np.concatenate([x, x], axis=1)
    tensors[f"visual.attn_pool.attn.{name}_proj_weight"] = wide
  wider = lambda x, axis: np.concatenate([x, x], axis=axis)
  for name in list(tensors):
    if of_trunk(name):
      x = tensors[name]
      for axis in [i for i, n in enumerate(x.shape) if n in (32, 96, 128)]:
        x = wider(x, axis)
      tensors[name] = x
  path = tmp_path / "wide.safetensors"
  from_file = tmp_path / "again.safetensors"
  reader.save(path, tensors)
  loaded = coca.load(path, **HEADS, num_heads_pool=4)
  coca.save(from_file, loaded)
  same(reader.load(from_file), reader.load(path))


def of_trunk(name):
  """Tensors of the ViT before its pooling."""
  trunk = ("class_", "positional", "conv1", "ln_pre", "transformer", "attn_pool.ln_k")
  return name.startswith(tuple(f"visual.{part}" for part in trunk))


def test_two_images_from_a_file_of_one(tmp_path):
  """Both cross-attentions begin as the one; the merging layers and the head do not."""
  one = {}
  for name, x in reader.load(file_of("nlvr")).items():
    if not re.search("self1|dense1|merge_layer|cls_head", name):
      one[name.replace("self0", "self").replace("dense0", "dense")] = x
  reader.save(tmp_path / "one.safetensors", one)
  want = blip.load(file_of("nlvr"), **HEADS).params
  fresh = ["objectives_classify/.*", ".*/merge/.*"]
  got = blip.init(abstract(want), path=tmp_path / "one.safetensors", fresh=fresh)
  for name in ("lower", "upper"):
    theirs = want["model"]["fusion"][name]["blocks"]["cross_0"]
    for k in range(2):
      ours = got["model"]["fusion"][name]["blocks"][f"cross_{k}"]
      jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  merge = got["model"]["fusion"]["upper"]["blocks"]["merge"]["kernel"]
  assert isinstance(merge, jax.ShapeDtypeStruct)
