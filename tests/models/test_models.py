"""The contract of encoders, fusion and the model that joins them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vlp_jax.models import text
from vlp_jax.models import vit
from vlp_jax.ops import posembed
from vlp_jax.ops import tree


def forward(module, variables, inputs):
  """(image tokens, text tokens, zimg, ztxt, fused)."""

  def run(m):
    image = m.encode_image(inputs["image"])
    words = m.encode_text(inputs["text"], inputs["text_mask"])
    fused = m.fuse(image, words)
    return image.x, words.x, m.embed_image(image), m.embed_text(words), fused.x

  return jax.jit(lambda v: module.apply(v, method=run))(variables)


@pytest.fixture(scope="module")
def albef_model():
  inputs = {k: jnp.asarray(v) for k, v in tiny.batch(4).items()}
  pretrainer = tiny.albef()
  variables = tiny.init(pretrainer, inputs)
  return pretrainer.model, {"params": variables["params"]["model"]}, inputs


def test_shapes_and_unit_norms(albef_model):
  module, variables, inputs = albef_model
  image, words, zimg, ztxt, fused = forward(module, variables, inputs)
  assert image.shape == (4, 5, 16) and words.shape == fused.shape == (4, 10, 16)
  assert zimg.shape == ztxt.shape == (4, 12)
  for z in (zimg, ztxt):
    assert z.dtype == jnp.float32
    np.testing.assert_allclose(jnp.linalg.norm(z, axis=1), 1, rtol=1e-5)


def test_permuting_the_batch_permutes_the_outputs(albef_model):
  module, variables, inputs = albef_model
  order = np.array([2, 0, 3, 1])
  straight = forward(module, variables, inputs)
  turned = forward(module, variables, {k: v[order] for k, v in inputs.items()})
  for a, b in zip(straight, turned, strict=True):
    np.testing.assert_allclose(a[order], b, rtol=1e-4, atol=1e-6)


def test_padding_changes_nothing(albef_model):
  module, variables, inputs = albef_model
  mask = np.asarray(inputs["text_mask"])
  noise = np.where(mask, inputs["text"], 7)
  plain = forward(module, variables, inputs)
  padded = forward(module, variables, inputs | {"text": jnp.asarray(noise)})
  for a, b in zip(plain, padded, strict=True):
    if a.shape[:2] == mask.shape:
      a, b = a[mask], b[mask]
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_uint8_images_are_normalised_as_clip_does(albef_model):
  module, variables, inputs = albef_model
  normal = (np.asarray(inputs["image"]) / 255 - module.image_mean) / module.image_std
  plain = forward(module, variables, inputs)
  floats = forward(module, variables, inputs | {"image": jnp.float32(normal)})
  np.testing.assert_allclose(plain[0], floats[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  "change",
  [dict(remat="full"), dict(remat="dots"), dict(unroll=2), dict(backend="einsum")],
)
def test_how_it_is_computed_changes_nothing(albef_model, change):
  _, variables, inputs = albef_model
  module = tiny.model()
  other = tiny.model(**change)

  def total(m, v):
    return sum((x**2).sum() for x in forward(m, v, inputs))

  want, want_grad = jax.jit(jax.value_and_grad(lambda v: total(module, v)))(variables)
  got, got_grad = jax.jit(jax.value_and_grad(lambda v: total(other, v)))(variables)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(want_grad))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * scale),
    got_grad,
    want_grad,
  )


def test_bf16_compute_keeps_float32_parameters_and_embeddings(albef_model):
  _, variables, inputs = albef_model
  half = tiny.model(dtype="bfloat16")
  image, words, zimg, ztxt, fused = forward(half, variables, inputs)
  assert image.dtype == words.dtype == fused.dtype == jnp.bfloat16
  assert zimg.dtype == ztxt.dtype == jnp.float32
  full = forward(tiny.model(), variables, inputs)
  np.testing.assert_allclose(zimg, full[2], atol=0.05)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_causal_text_does_not_look_ahead():
  module = text.Encoder(
    vocab=tiny.VOCAB,
    width=16,
    depth=2,
    num_heads=2,
    mlp_dim=32,
    length=10,
    attention="causal",
  )
  inputs = tiny.batch(2)
  ids, mask = jnp.asarray(inputs["text"]), jnp.ones((2, 10), bool)
  variables = jax.jit(module.init)(jax.random.key(0), ids, mask)
  changed = ids.at[:, 6:].set(9)
  a = module.apply(variables, ids, mask).x
  b = module.apply(variables, changed, mask).x
  np.testing.assert_allclose(a[:, :6], b[:, :6], atol=1e-6)
  assert np.abs(a[:, 6:] - b[:, 6:]).max() > 1e-3


def test_positions_may_start_as_sines_and_are_learned():
  sizes = dict(vocab=tiny.VOCAB, width=16, depth=1, num_heads=2, mlp_dim=32, length=10)
  module = text.Encoder(**sizes, posemb="learned_sincos")
  ids, mask = jnp.asarray(tiny.batch(2)["text"]), jnp.ones((2, 10), bool)
  variables = nn.unbox(jax.jit(module.init)(jax.random.key(0), ids, mask))
  table = variables["params"]["position"]["embedding"]
  np.testing.assert_array_equal(table, posembed.sincos1d(10, 16))
  loss = lambda v: jnp.square(module.apply(v, ids, mask).x[:, 0, 0]).sum()
  grads = jax.jit(jax.grad(loss))(variables)["params"]["position"]["embedding"]
  assert (np.abs(grads).max(axis=1) > 0).all()
  # Nothing else of the model starts otherwise.
  plain = nn.unbox(jax.jit(text.Encoder(**sizes).init)(jax.random.key(0), ids, mask))
  del variables["params"]["position"], plain["params"]["position"]
  jax.tree.map(np.testing.assert_array_equal, variables, plain)


@pytest.mark.parametrize("pool", ["first", "last", "mean", "map"])
def test_pools_ignore_padding(pool):
  module = text.Encoder(
    vocab=tiny.VOCAB, width=16, depth=1, num_heads=2, mlp_dim=32, length=10, pool=pool
  )
  ids = jnp.asarray(tiny.batch(2)["text"])
  mask = jnp.asarray(np.arange(10) < np.array([[4], [7]]))

  def pooled(m, ids, mask):
    return m.pooled(m(ids, mask))

  variables = jax.jit(functools.partial(module.init, method=pooled))(
    jax.random.key(0), ids, mask
  )
  long = module.apply(variables, ids, mask, method=pooled)
  short = module.apply(variables, ids[:1, :4], mask[:1, :4], method=pooled)
  assert long.shape == (2, 16)
  np.testing.assert_allclose(long[:1], short, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  "fields",
  [
    dict(),
    dict(class_token=False, pool="mean"),
    dict(class_token=False, pool="map"),
    dict(posemb="sincos2d"),
    dict(norm_pre=True, act="quick_gelu"),
  ],
)
def test_vit_variants(fields):
  module = vit.Encoder(
    width=16, depth=2, num_heads=2, mlp_dim=32, patch=8, res=16, **fields
  )
  image = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)

  def pooled(m, image):
    return m.pooled(m(image))

  variables = jax.jit(functools.partial(module.init, method=pooled))(
    jax.random.key(0), image
  )
  out = module.apply(variables, image, method=pooled)
  assert out.shape == (2, 16) and np.isfinite(out).all()
  assert ("posemb" in variables["params"]) == (fields.get("posemb") != "sincos2d")
  # The position table is resampled to the grid of a larger image.
  larger = jnp.asarray(
    np.random.default_rng(0).normal(size=(2, 24, 24, 3)), jnp.float32
  )
  tokens = module.apply(variables, larger)
  assert tokens.x.shape[1] == 9 + int(module.class_token)


def test_patches_are_rows_of_row_column_channel():
  image = jnp.arange(4 * 4 * 3).reshape(1, 4, 4, 3)
  got = vit.patchify(image, 2)
  want = [image[0, r : r + 2, c : c + 2].reshape(-1) for r in (0, 2) for c in (0, 2)]
  np.testing.assert_array_equal(got[0], want)


def test_drop_path_drops_whole_examples_and_keeps_the_mean():
  fields = dict(width=16, depth=2, num_heads=2, mlp_dim=32, patch=8, res=16)
  module = vit.Encoder(**fields, drop_path=0.5)
  image = jnp.asarray(np.random.default_rng(0).normal(size=(6, 16, 16, 3)), jnp.float32)
  variables = jax.jit(module.init)(jax.random.key(0), image)
  still = module.apply(variables, image).x
  np.testing.assert_array_equal(still, vit.Encoder(**fields).apply(variables, image).x)
  drop = lambda key: module.apply(variables, image, train=True, rngs={"dropout": key}).x
  outs = jnp.stack([drop(key) for key in jax.random.split(jax.random.key(1), 8)])
  assert (jnp.abs(outs - still).max(axis=(2, 3)) > 1e-6).any()


@pytest.mark.parametrize(
  "fields,message",
  [(dict(res=20), "not a multiple"), (dict(class_token=False), 'pool="first"')],
)
def test_vit_says_what_is_wrong(fields, message):
  module = vit.Encoder(
    **dict(width=16, depth=1, num_heads=2, mlp_dim=32, patch=8, res=16) | fields
  )
  with pytest.raises(ValueError, match=message):
    module.init(jax.random.key(0), jnp.ones((1, 16, 16, 3)))


def test_text_longer_than_its_table_is_refused():
  module = text.Encoder(
    vocab=tiny.VOCAB, width=16, depth=1, num_heads=2, mlp_dim=32, length=8
  )
  with pytest.raises(ValueError, match="model.text.length=8"):
    module.init(jax.random.key(0), jnp.ones((1, 9), jnp.int32), jnp.ones((1, 9), bool))


def test_a_tower_without_a_projection_has_the_width_of_the_space():
  with pytest.raises(ValueError, match=r"model.image of width 16.*model.embed_dim=12"):
    tiny.init(tiny.albef(project=("text",)), tiny.batch(4))


def test_seen_padding_has_no_mask_and_ends_the_row():
  module = text.Encoder(
    vocab=tiny.VOCAB,
    width=16,
    depth=1,
    num_heads=2,
    mlp_dim=32,
    length=6,
    see_padding=True,
    pool="last",
  )
  ids = jnp.asarray([[5, 6, 7, 0, 0, 0]], jnp.int32)
  masks = [jnp.asarray([[True] * n + [False] * (6 - n)]) for n in (3, 6)]
  params = module.init(jax.random.key(0), ids, masks[0])
  three, six = (module.apply(params, ids, mask) for mask in masks)
  assert three.mask is None
  np.testing.assert_array_equal(three.x, six.x)
  pooled = module.apply(params, three, method="pooled")
  np.testing.assert_array_equal(pooled, three.x[:, -1])


def test_fusing_without_a_fusion_stack_is_refused(albef_model):
  module, variables, inputs = albef_model
  with pytest.raises(ValueError, match="model.fusion is not set"):
    forward(module.clone(fusion=None), variables, inputs)


def test_parameters_carry_names_for_every_axis():
  pretrainer = tiny.albef()
  keys = {name: jax.random.key(0) for name in ("params", "dropout", "mask", "sample")}
  boxed = jax.eval_shape(lambda b: pretrainer.init(keys, b), tiny.batch(4))
  is_box = lambda x: hasattr(x, "names")
  for box in jax.tree.leaves(boxed["params"], is_leaf=is_box):
    assert is_box(box) and len(box.names) == box.value.ndim
  assert tree.size(tiny.init(pretrainer, tiny.batch(4))["params"]) > 10_000
