"""ViLT starts from a ViT: patches to its image tower, blocks to its stack."""

import numpy as np
import pytest

from vlp_jax.interop import initial
from vlp_jax.interop import reader
from vlp_jax.interop import rules

INTO = dict(image="model/image", fusion="model/fusion")
WIDTH, MLP, HEADS, DEPTH, PATCH, GRID = 8, 12, 2, 2, 4, 3


def vit():
  """A small file of timm's layout."""
  rng = np.random.default_rng(0)
  shapes = {
    "cls_token": (1, 1, WIDTH),
    "pos_embed": (1, 1 + GRID**2, WIDTH),
    "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
    "patch_embed.proj.bias": (WIDTH,),
    "norm.weight": (WIDTH,),
    "norm.bias": (WIDTH,),
    "head.weight": (5, WIDTH),
    "head.bias": (5,),
  }
  for i in range(DEPTH):
    block = {
      "norm1.weight": (WIDTH,),
      "norm1.bias": (WIDTH,),
      "attn.qkv.weight": (3 * WIDTH, WIDTH),
      "attn.qkv.bias": (3 * WIDTH,),
      "attn.proj.weight": (WIDTH, WIDTH),
      "attn.proj.bias": (WIDTH,),
      "norm2.weight": (WIDTH,),
      "norm2.bias": (WIDTH,),
      "mlp.fc1.weight": (MLP, WIDTH),
      "mlp.fc1.bias": (MLP,),
      "mlp.fc2.weight": (WIDTH, MLP),
      "mlp.fc2.bias": (WIDTH,),
    }
    shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
  return {k: rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}


def fresh():
  """What such a model has: a ViLT's tree, of zeros."""
  attention = {f"attn/{n}/kernel": (DEPTH, WIDTH, HEADS, 4) for n in QKV}
  attention |= {f"attn/{n}/bias": (DEPTH, HEADS, 4) for n in QKV}
  blocks = attention | {
    "attn/out/kernel": (DEPTH, HEADS, 4, WIDTH),
    "attn/out/bias": (DEPTH, WIDTH),
    "mlp/up/kernel": (DEPTH, WIDTH, MLP),
    "mlp/up/bias": (DEPTH, MLP),
    "mlp/down/kernel": (DEPTH, MLP, WIDTH),
    "mlp/down/bias": (DEPTH, WIDTH),
  }
  for name in ("norm_attn", "norm_mlp"):
    blocks |= {f"{name}/{leaf}": (DEPTH, WIDTH) for leaf in ("scale", "bias")}
  shapes = {f"model/fusion/blocks/{name}": shape for name, shape in blocks.items()}
  shapes |= {
    "model/fusion/norm/scale": (WIDTH,),
    "model/fusion/norm/bias": (WIDTH,),
    "model/fusion/type/embedding": (2, WIDTH),
    "model/image/cls": (WIDTH,),
    "model/image/posemb": (1 + GRID**2, WIDTH),
    "model/image/patch/kernel": (PATCH**2 * 3, WIDTH),
    "model/image/patch/bias": (WIDTH,),
    "model/text/word/embedding": (7, WIDTH),
  }
  return rules.nest({k: np.zeros(shape, np.float32) for k, shape in shapes.items()})


QKV = ("query", "key", "value")


def test_blocks_are_the_stack_s(tmp_path):
  path, file = tmp_path / "vit.safetensors", vit()
  reader.save(path, file)
  spec = dict(type="timm_vit", path=str(path), into=INTO)
  model = initial.load(spec, fresh())["model"]
  np.testing.assert_array_equal(model["image"]["cls"], file["cls_token"][0, 0])
  np.testing.assert_array_equal(model["image"]["posemb"], file["pos_embed"][0])
  pixels = file["patch_embed.proj.weight"].transpose(2, 3, 1, 0).reshape(-1, WIDTH)
  np.testing.assert_array_equal(model["image"]["patch"]["kernel"], pixels)
  np.testing.assert_array_equal(model["fusion"]["norm"]["scale"], file["norm.weight"])
  for i in range(DEPTH):
    query = file[f"blocks.{i}.attn.qkv.weight"][:WIDTH].T.reshape(WIDTH, HEADS, 4)
    got = model["fusion"]["blocks"]["attn"]["query"]["kernel"][i]
    np.testing.assert_array_equal(got, query)
  # Words and types are the run's own.
  assert not model["text"]["word"]["embedding"].any()
  assert not model["fusion"]["type"]["embedding"].any()


def test_an_odd_into_is_told(tmp_path):
  path = tmp_path / "vit.safetensors"
  reader.save(path, vit())
  spec = dict(type="timm_vit", path=str(path), into=dict(image="model/image"))
  with pytest.raises(ValueError, match="want a path, or a dict of image and fusion"):
    initial.load(spec, fresh())
