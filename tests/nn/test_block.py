"""A tower as a GPU runs it: kernels, even lengths, biases within; against a CPU's."""

import dataclasses

from flax import errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.models import text as text_lib
from vlp_jax.models import vit
from vlp_jax.nn import axes
from vlp_jax.nn import block
from vlp_jax.nn import linear
from vlp_jax.ops import mask as mask_lib

SIZE = dict(width=32, depth=2, num_heads=2, mlp_dim=64, dtype="bfloat16")


class Vocab:
  size = 50


@pytest.fixture
def gpu(monkeypatch):
  """What runs on a GPU, here: kernels interpreted, cuDNN's attention by XLA's.

  Yields what cuDNN was asked for: (queries, keys, whether it is told how many of them
  are real).
  """
  asked = []
  plain, rows_of = jax.nn.dot_product_attention, axes.kernel_rows

  def attend(query, key, value, mask=None, *, implementation, **lengths):
    assert implementation == "cudnn"
    asked.append((query.shape[1], key.shape[1], "key_value_seq_lengths" in lengths))
    return plain(query, key, value, mask=mask, implementation="xla", **lengths)

  def rows(*args):
    found = rows_of(*args)
    return found and dataclasses.replace(found, interpret=True)

  monkeypatch.setattr(axes, "platform", lambda: "gpu")
  monkeypatch.setattr(axes, "row_major", lambda x: x)
  monkeypatch.setattr(axes, "kernel_rows", rows)
  monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
  return asked


def image_tower():
  net = vit.Encoder(patch=4, res=16, norm_pre=True, **SIZE)
  images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
  return net, (images,)


def text_tower():
  sizes = SIZE | dict(norm="pre", attention="causal")
  net = text_lib.Encoder(vocab=Vocab(), length=7, **sizes)
  ids = jax.random.randint(jax.random.key(0), (3, 7), 0, 50)
  mask = jnp.arange(7) < jnp.array([7, 4, 5])[:, None]
  return net, (ids, mask)


def outcome(net, args, params):
  """Tokens, and the gradient of a function of those that are real."""

  def total(params):
    found = net.apply({"params": params}, *args)
    real = 1.0 if found.mask is None else found.mask[..., None]
    x = found.x.astype(jnp.float32) * real
    return jnp.sum(jnp.sin(3.0 * x)), x

  grads, x = jax.grad(total, has_aux=True)(params)
  return x, grads


def distance(found, wanted):
  """Between two trees of arrays, as a share of the second's norm."""
  norm = lambda tree: np.sqrt(sum(float(jnp.sum(x * x)) for x in jax.tree.leaves(tree)))
  apart = jax.tree.map(lambda a, b: a.astype(jnp.float32) - b, found, wanted)
  return norm(apart) / norm(wanted)


@pytest.mark.parametrize("tower", [image_tower, text_tower])
def test_a_tower_is_the_same_on_a_gpu(tower, request):
  net, args = tower()
  params = jax.tree.map(
    lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape),
    init(net, args),
  )
  wanted = outcome(net, args, params)
  exact = outcome(net.clone(dtype="float32"), args, params)
  request.getfixturevalue("gpu")
  found = outcome(net, args, params)
  # Of rounding to bfloat16, which both do, not of anything else.
  for i in range(2):
    rounding = distance(wanted[i], exact[i])
    assert 1e-4 < rounding < 0.05
    assert distance(found[i], exact[i]) < 1.2 * rounding


def init(net, args):
  return jax.tree.map(
    lambda p: p.unbox(),
    net.init(jax.random.key(1), *args)["params"],
    is_leaf=lambda p: hasattr(p, "unbox"),
  )


FIRST = {
  image_tower: (("mlp", "up"), [-0.00635161, -0.00532667]),
  text_tower: (("attn", "query"), [-0.0239601, 0.0223366]),
}


@pytest.mark.parametrize("tower", FIRST)
def test_a_seed_keeps_its_meaning(tower):
  """Keys count how often a layer was traced: what a seed drew once, it draws."""
  (branch, name), wanted = FIRST[tower]
  kernel = init(*tower())["blocks"][branch][name]["kernel"]
  found = kernel.reshape(2, -1)[:, 0]
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_odd_lengths_are_filled_up_once(gpu, remat):
  net, args = image_tower()
  net = net.clone(remat=remat)
  params = init(net, args)
  gpu.clear()
  found = net.apply({"params": params}, *args)
  assert found.x.shape[1] == 17
  assert set(gpu) == {(18, 18, True)}
  net, args = text_tower()
  params = init(net, args)
  gpu.clear()
  assert net.apply({"params": params}, *args).x.shape[1] == 7
  assert set(gpu) == {(8, 8, False)}  # The mask says which are real.


def test_one_token_of_the_last_layer_is_xlas(gpu):
  """The layers below are filled up; what stands behind is not seen by the one."""
  net, args = image_tower()
  net = net.clone(depth=3, unroll=3, pool="last", class_token=False, res=12)
  args = (args[0][:, :12, :12],)
  params = init(net, args)
  run = lambda whole: net.apply({"params": params}, *args, whole=whole).x[:, -1:]
  with pytest.MonkeyPatch.context() as patch:
    counted, by = jax.nn.dot_product_attention, []

    def listen(*args, implementation, **more):
      by.append(implementation)
      return counted(*args, implementation="cudnn", **more)

    patch.setattr(jax.nn, "dot_product_attention", listen)
    gpu.clear()
    found = run(False)
  assert by == ["cudnn", "xla"]  # Of the scanned layers below, and of the last.
  assert gpu == [(10, 10, True), (1, 10, False)]
  wanted = run(True)
  np.testing.assert_allclose(found, wanted, atol=0.02 * float(jnp.abs(wanted).max()))


def test_maps_are_of_the_tokens_that_there_are(gpu):
  net, args = image_tower()
  params = init(net, args)
  gpu.clear()
  _, state = net.apply({"params": params}, *args, mutable=["attention"])
  (maps,) = jax.tree.leaves(state["attention"])
  assert maps.shape == (2, 2, 2, 17, 17)
  assert not gpu


def test_dropped_weights_are_not_cudnns(gpu):
  net, args = image_tower()
  net = net.clone(dropout_attention=0.1)
  params = init(net, args)
  gpu.clear()
  rngs = dict(dropout=jax.random.key(2))
  assert net.apply({"params": params}, *args, train=True, rngs=rngs).x.shape[1] == 17
  assert not gpu


def test_what_is_filled_up_is_seen_by_none():
  x = jnp.ones((2, 3, 4))
  longer, mask = block.even(x, None)
  assert longer.shape == (2, 4, 4)
  np.testing.assert_array_equal(mask.seen(4), [[[[True, True, True, False]]]])
  own = jnp.ones((2, 1, 1, 3), bool)
  _, mask = block.even(x, own)
  np.testing.assert_array_equal(mask[0, 0], [[True, True, True, False]])
  each = jnp.tril(jnp.ones((1, 1, 3, 3), bool))
  _, mask = block.even(x, each)
  assert mask.shape == (1, 1, 4, 4)
  np.testing.assert_array_equal(mask[0, 0, :3, :3], each[0, 0])
  assert not mask[..., 3].any()


def test_first_is_a_mask_for_any_backend():
  seen = mask_lib.First(2).seen(3)
  np.testing.assert_array_equal(seen, [[[[True, True, False]]]])


@pytest.mark.parametrize(
  ("platform", "dtype", "shape", "wanted"),
  [
    ("gpu", "bfloat16", (2, 3, 8), True),
    ("gpu", "float32", (2, 3, 8), False),
    ("cpu", "bfloat16", (2, 3, 8), False),
    ("tpu", "bfloat16", (2, 3, 8), False),
    ("gpu", "bfloat16", (3, 8), False),
    ("gpu", "bfloat16", (2, 3, 16_384), False),
  ],
)
def test_what_kernels_are_for(platform, dtype, shape, wanted, monkeypatch):
  monkeypatch.setattr(axes, "platform", lambda: platform)
  x = jax.ShapeDtypeStruct(shape, dtype)
  found = axes.kernel_rows(x, dtype, "act_embed")
  assert (found is not None) == wanted


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_a_bias_of_heads_is_added_as_it_lies(platform, monkeypatch):
  """As one axis on GPUs, within cuBLAS's product; a TPU would copy the array for it."""
  layer = linear.Linear("BLD,DNH->BLNH", (4, 2, 3), (None,) * 3)
  x = jax.random.normal(jax.random.key(0), (2, 5, 4))
  params = jax.tree.map(
    lambda p: p + jnp.arange(p.size, dtype=p.dtype).reshape(p.shape),
    nn.unbox(layer.init(jax.random.key(1), x)),
  )
  want = layer.apply(params, x)
  monkeypatch.setattr(axes, "platform", lambda: platform)
  np.testing.assert_array_equal(layer.apply(params, x), want)
  made = str(jax.make_jaxpr(layer.apply)(params, x))
  sums = [line for line in made.splitlines() if " add " in line]
  assert len(sums) == 1
  assert ("f32[2,5,6]" if platform == "gpu" else "f32[2,5,2,3]") in sums[0]


def test_a_parameter_of_another_shape_is_told():
  layer = linear.Linear("BLD,DF->BLF", (4, 3), (None,) * 2)
  x = jnp.ones((2, 5, 4))
  params = init(layer, (x,))
  params["kernel"] = jnp.ones((4, 2))
  with pytest.raises(errors.ScopeParamShapeError, match=r"kernel.*4, 3.*4, 2"):
    layer.apply({"params": params}, x)


def test_biases_of_several_axes_are_added_as_one():
  layer = linear.Linear("BLD,DNH->BLNH", (4, 2, 3), (None,) * 3)
  x = jax.random.normal(jax.random.key(0), (2, 5, 4))
  params = init(layer, (x,))
  params["bias"] = jnp.arange(6.0).reshape(2, 3)
  found = layer.apply({"params": params}, x)
  wanted = jnp.einsum("BLD,DNH->BLNH", x, params["kernel"]) + params["bias"]
  np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
