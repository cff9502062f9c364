"""CLIP's residual network: its seam to the others, its memory, bad input."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests import tiny
from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.models import resnet
from vlp_jax.models import text
from vlp_jax.models import vlm
from vlp_jax.models.fusion import cross_attention
from vlp_jax.objectives import itc
from vlp_jax.objectives import itm
from vlp_jax.ops import tree


def encoder(**fields):
  given = dict(width=12, blocks=(1, 2, 1, 1), channels=4, num_heads=2, res=64)
  return resnet.Encoder(**(given | fields))


def images(count=4, res=64):
  return np.random.default_rng(0).normal(size=(count, res, res, 3)).astype(np.float32)


@functools.cache
def variables():
  return nn.unbox(jax.jit(encoder().init)(jax.random.key(0), images()))


def run(module, variables, image, train=False):
  apply = lambda v, x: module.apply(v, x, train=train, mutable=["memory"])
  return jax.jit(apply)(variables, image)


def test_a_seed_keeps_its_meaning():
  """Keys count how often a layer was traced: what a seed drew once, it draws."""
  kernel = variables()["params"]["stage_1"]["rest"]["look"]["conv"]["kernel"]
  wanted = [-0.0313717, -0.193235]
  np.testing.assert_allclose(kernel.reshape(-1)[:2], wanted, rtol=1e-5)


def test_tokens_and_what_stands_for_the_image():
  tokens, _ = run(encoder(), variables(), images())
  assert tokens.x.shape == (4, 4, 12) and tokens.pooled.shape == (4, 12)
  assert encoder().pooled(tokens) is tokens.pooled
  # Other images say nothing to an image where batch norm reads what it remembers.
  alone, _ = run(encoder(), variables(), images()[:1])
  np.testing.assert_allclose(alone.pooled, tokens.pooled[:1], rtol=1e-4, atol=1e-5)
  # A larger image: more tokens, positions resampled.
  larger, _ = run(encoder(), variables(), images(1, 96))
  assert larger.x.shape == (1, 9, 12)


def test_gradients_reach_all_parameters():
  module, given = encoder(remat="full"), variables()

  def loss(params):
    full = given | {"params": params}
    tokens, new = module.apply(full, images(), train=True, mutable=["memory"])
    return tokens.pooled.sum() + tokens.x.std(), new["memory"]

  # As it is drawn, each block's last norm has a scale of 0, and passes nothing on.
  params = jax.tree.map(lambda x: x + 0.1, given["params"])
  grads, memory = jax.jit(jax.grad(loss, has_aux=True))(params)
  for path, gradient in tree.flatten(grads).items():
    if path != "attn/key/bias":  # softmax does not see it
      assert np.abs(gradient).max() > 0, path
  for path, new in tree.flatten(memory).items():
    assert np.abs(new - tree.flatten(given["memory"])[path]).max() > 0, path


def test_blocks_begin_as_the_identity():
  scales = {
    k: v for k, v in tree.flatten(variables()["params"]).items() if "scale" in k
  }
  assert len(scales) == 3 + 4 * 4 + 3
  for path, scale in scales.items():
    np.testing.assert_array_equal(scale, 0.0 if "widen" in path else 1.0, path)


def model(**fields):
  sizes = dict(depth=1, num_heads=2, mlp_dim=16, init_std=None)
  words = text.Encoder(vocab=tiny.VOCAB, width=12, length=10, **sizes)
  small = encoder(blocks=(1, 1, 1, 1), res=32)
  return vlm.VLM(image=small, text=words, embed_dim=8, **fields)


def test_a_teacher_reads_its_statistics():
  objectives = dict(itc=itc.Objective(distill=0.4))
  module = pretrainer_lib.Pretrainer(model(), objectives, dict(itc=1.0))
  batch = tiny.batch(4) | dict(image=images(res=32))
  given = tiny.init(module, batch)
  loss, (_, new) = tiny.loss(module, given, batch, teacher=given["params"])
  assert np.isfinite(loss)
  image = new["memory"]["model"]["image"]
  # One live pass a step; the teacher's, in inference, leaves no trace.
  assert image["stem_0"]["norm"]["batches"] == 1
  assert image["stage_3"]["first"]["look"]["norm"]["batches"] == 1
  # With other statistics the teacher teaches something else; the live model, which
  # trains, has those of its batch.
  other = given | {"memory": jax.tree.map(lambda x: x + 1, given["memory"])}
  moved, _ = tiny.loss(module, other, batch, teacher=given["params"])
  assert float(moved) != float(loss)


def test_a_fusion_reads_its_tokens():
  fusion = cross_attention.Fusion(depth=1, num_heads=2, mlp_dim=16)
  objectives = dict(itm=itm.Objective(width=12))
  module = pretrainer_lib.Pretrainer(model(fusion=fusion), objectives, dict(itm=1.0))
  batch = tiny.batch(4) | dict(image=images(res=32))
  rngs = {"params": jax.random.key(0), **tiny.rngs()}
  variables = jax.eval_shape(lambda b: module.init(rngs, b), batch)
  assert set(variables["memory"]) == {"model"}


@pytest.mark.parametrize(
  "fields, text",
  [
    (dict(res=50), "res=50 is not a multiple of 32"),
    (dict(blocks=(1, 2, 1)), "want four numbers"),
    (dict(blocks=(1, 2, 0, 1)), "want four numbers"),
  ],
)
def test_bad_sizes(fields, text):
  with pytest.raises(ValueError, match=text):
    jax.eval_shape(encoder(**fields).init, jax.random.key(0), images())
