"""CLIP with a residual network against its official code (openai/CLIP clip/model.py).

Features, logits, loss and gradients on fp16-rounded weights, batch norm reading its
running statistics; the official file there and back. Tolerance as in test_parity_clip.
"""

import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import test_parity_clip as parity
from vlp_jax import convert
from vlp_jax.interop import clip_resnet
from vlp_jax.interop import formats
from vlp_jax.interop import initial
from vlp_jax.interop import reader
from vlp_jax.objectives import itc
from vlp_jax.ops import tree

FOLDER = pathlib.Path(__file__).parent / "reference" / "clip_rn"
FILE = FOLDER / "model_jit.pt"


def spec():
  """`c.model` of the reference's config.json."""
  size = json.loads((FOLDER / "config.json").read_text())
  image = dict(
    type="resnet",
    width=size["embed_dim"],
    blocks=tuple(size["vision_layers"]),
    channels=size["vision_width"],
    num_heads=size["vision_heads"],
    res=size["image_resolution"],
  )
  # The same text tower, and the pooling's last layer in the place of a projection.
  text = dict(
    type="text",
    width=size["transformer_width"],
    depth=size["transformer_layers"],
    num_heads=size["transformer_heads"],
    mlp_dim=4 * size["transformer_width"],
    length=size["context_length"],
    types=0,
    norm="pre",
    attention="causal",
    pool="last",
    norm_eps=1e-5,
    act="quick_gelu",
  )
  return dict(
    image=image,
    text=text,
    embed_dim=size["embed_dim"],
    project=("text",),
    scale="log_scale",
    project_bias=False,
  )


@pytest.fixture(scope="module")
def official():
  return clip_resnet.load(FILE, num_heads_image=4)


@pytest.fixture
def ordered():
  """Compiled in the mode whose sums come near enough.

  The gradient of the attention pool's query nearly cancels: by the order of the sums, a
  few of its numbers are off by 1e-5 to 2e-5 of the largest, and the tolerance is 1e-5.
  jax 0.10 is within it by the quick compiling of tests, jax 0.12 by that of users.
  """
  name = "jax_disable_most_optimizations"
  before = jax.config.values[name]
  jax.config.update(name, jax.__version_info__ < (0, 11))
  yield
  jax.config.update(name, before)


@pytest.mark.usefixtures("ordered")
def test_features_loss_and_gradients(official):
  inputs, expected = parity.read("clip_rn")
  ids = inputs["text"]
  mask = np.arange(ids.shape[1]) <= ids.argmax(axis=1)[:, None]
  got = parity.run(
    spec(),
    320,
    itc.Objective(),
    official.params,
    inputs["image"],
    ids,
    mask,
    memory=jax.tree.map(jnp.asarray, official.memory),
  )
  parity.close(got.pimg, expected["image_features"])
  parity.close(got.ptxt, expected["text_features"])
  logits = got.scale * got.zimg @ got.ztxt.T
  parity.close(logits, expected["logits_per_image"])
  parity.close(logits.T, expected["logits_per_text"])
  parity.close(got.loss, expected["contrastive_loss"])
  parity.check_gradients(clip_resnet.export(got.grads), expected, 11)


def test_there_and_back_bit_by_bit(tmp_path, official):
  want = reader.load(FILE)
  assert formats.find(FILE) == "clip_resnet"
  ours, file = tmp_path / "ours", tmp_path / "RN.pt"
  options = ("--set", "num_heads_image=4")
  convert.main(["--weights", str(FILE), "--out", str(ours), *options])
  options = ("--set", "openai=True", "--to", "clip_resnet")
  convert.main(["--weights", str(ours), "--out", str(file), *options])
  got = reader.load(file)
  assert got.keys() == want.keys()
  for key, x in want.items():
    assert got[key].dtype == x.dtype and got[key].tobytes() == x.tobytes(), key
  # open_clip's have neither the three numbers nor 16 bits.
  plain = tmp_path / "plain.safetensors"
  clip_resnet.save(plain, official)
  assert formats.find(plain) == "clip_resnet"
  assert want.keys() - reader.load(plain).keys() == {
    "input_resolution",
    "context_length",
    "vocab_size",
  }


def test_a_run_starts_from_it(official):
  """Parameters and running statistics; a queue beside them stays; sizes are told."""
  float32 = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32)
  start = dict(type="clip_resnet", path=str(FILE))
  params = jax.tree.map(float32, official.params)
  # Of 96 pixels: the table of places is resized.
  table = jax.ShapeDtypeStruct((10, 256), jnp.float32)
  params["model"]["image"]["posemb"] = table
  got = tree.flatten(initial.load(start, params))
  assert got.pop("model/image/posemb").shape == (10, 256)
  for path, x in tree.flatten(official.params).items():
    if path in got:
      np.testing.assert_array_equal(got[path], x, path)
  queue = jax.ShapeDtypeStruct((8,), jnp.int32)
  memory = official.memory | dict(objectives_itc=dict(id_queue=queue))
  got = initial.load_memory(start, memory)
  assert got.pop("objectives_itc")["id_queue"] is queue
  jax.tree.map(np.testing.assert_array_equal, got, official.memory)
  # Beside a part whose format keeps nothing.
  both = dict(text=dict(type="hf_bert", path="bert"), image=start)
  jax.tree.map(
    np.testing.assert_array_equal,
    initial.load_memory(both, official.memory),
    official.memory,
  )

  params["model"]["image"]["stage_1"]["rest"]["look"]["conv"]["kernel"] = table
  with pytest.raises(ValueError, match=r"stage_1/rest/look/conv/kernel: file \[1, 3"):
    initial.load(start, params)


def test_a_model_of_other_layers_is_refused(official):
  start = dict(type="clip_resnet", path=str(FILE))
  text = types.SimpleNamespace(act="gelu", norm_eps=1e-5)
  model = types.SimpleNamespace(image=types.SimpleNamespace(norm_eps=1e-5), text=text)
  with pytest.raises(ValueError, match="model.text.act='gelu', but .* 'quick_gelu'"):
    initial.load(start, official.params, model=model)
  text.act = "quick_gelu"
  initial.load(start, official.params, model=model)


def test_a_model_of_another_kind_is_refused():
  with pytest.raises(ValueError, match="no CLIP with a residual network"):
    clip_resnet.export({"model": {"image": {"patch": {"kernel": np.zeros((2, 2))}}}})
