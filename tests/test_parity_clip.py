"""Against the official code of dual encoders: features, losses, gradients.

In tests/reference: clip_vit is of openai/CLIP clip/model.py; openclip_siglip and
clip_siglip_losses of mlfoundations/open_clip; hf_clip and hf_siglip of transformers.
Tolerance rtol 1e-4 with atol 1e-5 of the array's largest value: all sides are float32.
"""

import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax import build
from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.data import vocab as vocab_lib
from vlp_jax.interop import clip
from vlp_jax.interop import hf_dual
from vlp_jax.interop import open_clip
from vlp_jax.nn import ask
from vlp_jax.objectives import itc

REFERENCE = pathlib.Path(__file__).parent / "reference"
MEAN_OF_HALF = dict(image_mean=(0.5,) * 3, image_std=(0.5,) * 3)


def read(name):
  """(inputs, expected) of a reference."""
  folder = REFERENCE / name
  return [dict(np.load(folder / f"{kind}.npz")) for kind in ("inputs", "expected")]


def close(got, want, name=""):
  want = np.asarray(want)
  scale = np.abs(want).max()
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * scale, err_msg=name)


def vocab(size):
  return vocab_lib.Vocab(size=size, pad=0, unk=1, cls=size - 2, sep=size - 1, mask=None)


def openai_spec(name="clip_vit"):
  """`c.model` of the reference's config.json."""
  size = json.loads((REFERENCE / name / "config.json").read_text())
  both = dict(norm_eps=1e-5, act="quick_gelu")
  return dict(
    image=dict(
      width=size["vision_width"],
      depth=size["vision_layers"],
      num_heads=size["vision_heads"],
      mlp_dim=4 * size["vision_width"],
      patch=size["vision_patch_size"],
      res=size["image_resolution"],
      norm_pre=True,
      patch_bias=False,
      **both,
    ),
    text=dict(
      width=size["transformer_width"],
      depth=size["transformer_layers"],
      num_heads=size["transformer_heads"],
      mlp_dim=4 * size["transformer_width"],
      length=size["context_length"],
      types=0,
      norm="pre",
      attention="causal",
      pool="last",
      **both,
    ),
    embed_dim=size["embed_dim"],
    scale="log_scale",
    project_bias=False,
  )


def siglip_spec():
  config = json.loads((REFERENCE / "openclip_siglip" / "config.json").read_text())
  size, text = config["timm"], config["text_cfg"]
  width = size["embed_dim"]
  return dict(
    image=dict(
      width=width,
      depth=size["depth"],
      num_heads=size["num_heads"],
      mlp_dim=size["mlp_ratio"] * width,
      patch=size["patch_size"],
      res=size["img_size"],
      class_token=False,
      pool="map",
      norm_eps=size["norm_eps"],
    ),
    text=dict(
      width=text["width"],
      depth=text["layers"],
      num_heads=text["heads"],
      mlp_dim=4 * text["width"],
      length=text["context_length"],
      types=0,
      norm="pre",
      see_padding=True,
      pool="last",
      norm_eps=text["norm_kwargs"]["eps"],
    ),
    embed_dim=config["embed_dim"],
    project=("text",),
    scale="log_scale",
    **MEAN_OF_HALF,
  )


def run(
  spec,
  words,
  objective,
  params,
  image,
  ids,
  mask,
  grids=None,
  *,
  memory=None,
  gradients=True,
):
  """Arrays of a forward pass, and the gradients of the loss, of a dual encoder.

  image: [B, 3, R, R], or with grids [B, 2] rows of patches. memory: of its layers.
  gradients: or without.
  """
  kept = {"memory": memory} if memory else {}
  model = build.model(spec, vocab=vocab(words), length=ids.shape[1])
  whole = pretrainer_lib.Pretrainer(model, dict(itc=objective), dict(itc=1.0))
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  batch = dict(
    image=jnp.asarray(image if grids is not None else image.transpose(0, 2, 3, 1)),
    text=jnp.asarray(ids, jnp.int32),
    text_mask=jnp.asarray(mask),
    image_id=jnp.arange(len(image), dtype=jnp.int32),
  )
  if grids is not None:
    batch["image_size"] = jnp.asarray(grids, jnp.int32)

  def forward(self, batch):
    model = self.model
    enc = pretrainer_lib.encode(model, ask.Live(), batch, jnp.int32(0))
    loss, _ = self.objectives["itc"](model, enc, batch)
    return loss.value(), dict(
      zimg=enc.zimg,
      ztxt=enc.ztxt,
      image=enc.image.x,
      text=enc.text.x,
      scale=model.inverse_temperature(),
      # Before they are of unit norm.
      pimg=model.image_project(model.image.pooled(enc.image)),
      ptxt=model.text_project(model.text.pooled(enc.text)),
    )

  def loss(params):
    return whole.apply({"params": params} | kept, batch, method=forward)

  if not gradients:
    value, arrays = jax.jit(loss)(params)
    return types.SimpleNamespace(loss=value, **arrays)
  (value, arrays), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  grads = jax.tree.map(np.asarray, grads)
  return types.SimpleNamespace(loss=value, grads=grads, **arrays)


def check_gradients(ours, expected, count):
  names = [name for name in expected if name.startswith("grad/")]
  assert len(names) == count
  for name in names:
    close(ours[name.removeprefix("grad/")], expected[name], name)


def test_openai_clip():
  inputs, expected = read("clip_vit")
  ids = inputs["text"]
  # As a tokenizer gives it: all up to the first of the highest id.
  mask = np.arange(ids.shape[1]) <= ids.argmax(axis=1)[:, None]
  params = clip.load(REFERENCE / "clip_vit" / "model_jit.pt")
  got = run(openai_spec(), 320, itc.Objective(), params, inputs["image"], ids, mask)
  close(got.pimg, expected["image_features"])
  close(got.ptxt, expected["text_features"])
  logits = got.scale * got.zimg @ got.ztxt.T
  close(logits, expected["logits_per_image"])
  close(logits.T, expected["logits_per_text"])
  close(got.loss, expected["contrastive_loss"])
  check_gradients(clip.export(got.grads), expected, 11)


def test_siglip_of_open_clip():
  inputs, expected = read("openclip_siglip")
  ids = inputs["text"]
  params = open_clip.load(
    REFERENCE / "openclip_siglip" / "weights.safetensors",
    num_heads_image=4,
    num_heads_text=4,
  )
  sigmoid = itc.Objective(loss="sigmoid")
  # The mask says nothing: padding is read.
  mask = np.arange(ids.shape[1]) < 3 + np.zeros((len(ids), 1))
  got = run(siglip_spec(), 100, sigmoid, params, inputs["image"], ids, mask)
  close(got.zimg, expected["image_features"])
  close(got.ztxt, expected["text_features"])
  close(got.scale, expected["logit_scale"])
  close(params["objectives_itc"]["bias"], expected["logit_bias"])
  close(got.loss, expected["siglip_loss"])
  check_gradients(open_clip.export(got.grads), expected, 7)


def test_clip_of_transformers():
  inputs, expected = read("hf_clip")
  folder = REFERENCE / "hf_clip"
  spec, params = hf_dual.model_spec(folder), hf_dual.load(folder).params
  mask = inputs["attention_mask"] > 0
  got = run(
    spec,
    160,
    itc.Objective(),
    params,
    inputs["pixel_values"],
    inputs["input_ids"],
    mask,
  )
  close(got.zimg, expected["image_embeds"])
  close(got.ztxt, expected["text_embeds"])
  close(got.text, expected["text_last_hidden_state"])
  logits = got.scale * got.zimg @ got.ztxt.T
  close(logits, expected["logits_per_image"])
  close(logits.T, expected["logits_per_text"])
  close(got.loss, expected["loss"])
  # Theirs is before the last norm, which is of the class token there.
  x = expected["vision_last_hidden_state"].astype(np.float64)
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  norm = params["model"]["image"]["norm"]
  close(got.image, x * norm["scale"] + norm["bias"])
  check_gradients(hf_dual.export(got.grads, "clip"), expected, 3)


def test_siglip_of_transformers():
  inputs, expected = read("hf_siglip")
  folder = REFERENCE / "hf_siglip"
  spec, params = hf_dual.model_spec(folder), hf_dual.load(folder).params
  ids = inputs["input_ids"]
  got = run(
    spec,
    160,
    itc.Objective(loss="sigmoid"),
    params,
    inputs["pixel_values"],
    ids,
    np.ones(ids.shape, bool),
  )
  close(got.zimg, expected["image_embeds"])
  close(got.ztxt, expected["text_embeds"])
  close(got.image, expected["vision_last_hidden_state"])
  bias = params["objectives_itc"]["bias"]
  close(got.scale * got.zimg @ got.ztxt.T + bias, expected["logits_per_image"])
  close(got.loss, expected["loss"])
  check_gradients(hf_dual.export(got.grads, "siglip"), expected, 3)


def test_siglip2_of_transformers():
  """Images of three aspect ratios, as padded rows of patches."""
  inputs, expected = read("hf_siglip2")
  folder = REFERENCE / "hf_siglip2"
  spec, params = hf_dual.model_spec(folder), hf_dual.load(folder).params
  ids, grids = inputs["input_ids"], inputs["spatial_shapes"]
  seen = np.arange(16) < grids.prod(axis=1)[:, None]
  np.testing.assert_array_equal(seen, inputs["pixel_attention_mask"])
  assert len({tuple(grid) for grid in grids}) > 1 and not seen.all()
  # What is behind an image's patches changes nothing.
  pixels = np.where(seen[..., None], inputs["pixel_values"], 7.0)
  sigmoid = itc.Objective(loss="sigmoid")
  real = np.ones(ids.shape, bool)
  got = run(spec, 160, sigmoid, params, pixels, ids, real, grids)
  close(got.zimg, expected["image_embeds"])
  close(got.ztxt, expected["text_embeds"])
  bias = params["objectives_itc"]["bias"]
  close(got.scale * got.zimg @ got.ztxt.T + bias, expected["logits_per_image"])
  close(got.loss, expected["loss"])


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_losses_of_open_clip(kind):
  """ITC on given embeddings: the loss and all its gradients."""
  inputs, expected = read("clip_siglip_losses")
  objective = itc.Objective(loss="softmax" if kind == "clip" else "sigmoid")
  batch = dict(image_id=jnp.arange(len(inputs["image_features"])))
  leaves = dict(
    image=jnp.asarray(inputs["image_features"]),
    text=jnp.asarray(inputs["text_features"]),
    log_scale=jnp.asarray(inputs[f"{kind}_log_scale"]),
  )
  if kind == "siglip":
    leaves["bias"] = jnp.asarray(inputs["siglip_bias"])

  def loss(leaves):
    enc = pretrainer_lib.Encoded(
      None, None, None, leaves["image"], leaves["text"], jnp.int32(0)
    )
    scale = jnp.exp(leaves["log_scale"])
    model = types.SimpleNamespace(inverse_temperature=lambda: scale)
    own = {"bias": leaves["bias"]} if kind == "siglip" else {}
    value, _ = objective.apply({"params": own}, model, enc, batch)
    return value.value()

  value, grads = jax.value_and_grad(loss)(leaves)
  close(value, expected[f"{kind}_loss"])
  for name, got in grads.items():
    close(got, expected[f"{kind}_grad/{name}"], name)
