"""A tower of which one token is wanted makes no more of its last layer than that."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.models import text as text_lib
from vlp_jax.models import vit
from vlp_jax.nn import ask
from vlp_jax.nn import block
from vlp_jax.objectives import itc
from vlp_jax.objectives import text_mlm
from vlp_jax.ops import reduce
from vlp_jax.planning import flops

SIZES = dict(width=16, depth=2, num_heads=2, mlp_dim=32, unroll=2, init_std=0.2)


class Vocab:
  size = 50


def images(**fields):
  pixels = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
  return vit.Encoder(**SIZES | dict(patch=4, res=16) | fields), (pixels,)


def texts(**fields):
  ids = jax.random.randint(jax.random.key(0), (4, 7), 0, 50)
  mask = jnp.arange(7) < jnp.array([7, 4, 1, 5])[:, None]
  return text_lib.Encoder(**SIZES | dict(vocab=Vocab(), length=9) | fields), (ids, mask)


TOWERS = {
  "clip_image": images(norm_pre=True, act="quick_gelu"),
  "remade_image": images(remat="full"),
  "last_patch": images(class_token=False, pool="last", remat="dots"),
  "dropped_patches": images(drop_patches=0.5),
  "clip_text": texts(norm="pre", attention="causal", pool="last", types=0),
  "remade_text": texts(norm="pre", attention="causal", pool="last", remat="full"),
  "siglip_text": texts(norm="pre", pool="last", types=0, see_padding=True),
  "bert": texts(),
  "scanned": texts(norm="pre", pool="last", unroll=1),
}


@functools.partial(jax.jit, static_argnums=0)
def started(net, args):
  """Parameters of which none begins as 0, which would hide one that is missing."""
  run = lambda m: m.pooled(m(*args))
  params = nn.unbox(net.init(keys(), method=run)["params"])
  moved = lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size)).reshape(p.shape)
  return jax.tree.map(moved, params)


def keys():
  return {name: jax.random.key(i) for i, name in enumerate(("params", "mask"))}


def shapes(net, args, **more):
  """Of what a tower returns."""
  rngs = dict(mask=jax.random.key(1))
  call = lambda params: net.apply({"params": params}, *args, rngs=rngs, **more)
  return jax.eval_shape(call, jax.eval_shape(lambda: started(net, args)))


def pooled(net, args, params, **more):
  run = lambda m: m.pooled(m(*args, **more))
  rngs = dict(mask=jax.random.key(1), dropout=jax.random.key(2))
  return net.apply({"params": params}, method=run, rngs=rngs)


def close(got, wanted):
  """Within 1e-5 of the largest; of what is 0 but for rounding, of 1."""
  atol = 1e-5 * max(1.0, float(jnp.abs(wanted).max()))
  np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=atol)


def products(net, args, **more):
  """Operations of a forward and backward pass."""

  def total(params):
    return jnp.sum(pooled(net, args, params, **more))

  return flops.count(jax.grad(total), jax.eval_shape(lambda: started(net, args)))


@pytest.mark.parametrize("name", TOWERS)
def test_the_same_vector_and_gradient(name):
  net, args = TOWERS[name]

  def total(params, whole):
    z = pooled(net, args, params, whole=whole, train=True)
    return jnp.sum(jnp.sin(3.0 * z)), z

  run = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=1)
  params = started(net, args)
  got, wanted = run(params, False), run(params, True)
  jax.tree.map(close, got, wanted)
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(got[1]["blocks"]["mlp"]))


@pytest.mark.parametrize("name", TOWERS)
def test_one_token_is_made_and_no_other(name):
  net, args = TOWERS[name]
  found = shapes(net, args, whole=False, train=True)
  assert found.x.shape == (4, 1, 16)
  assert found.mask is None


@pytest.mark.parametrize("make", [images, texts])
def test_the_products_that_are_spared(make):
  """Of the last layer all but keys and values, for all tokens but one."""
  net, args = make()
  tokens, width, mlp = (17 if make is images else 7), 16, 32
  spared = products(net, args) - products(net, args, whole=False)
  # Query, what comes out, both maps of the MLP; logits and what they weigh.
  each = 2 * width**2 + 2 * width * mlp + 2 * tokens * width
  assert spared == 3 * 2 * 4 * (tokens - 1) * each


@pytest.mark.parametrize(
  ("make", "fields"),
  [
    (images, dict(unroll=1)),  # Scanned.
    (texts, dict(depth=3)),  # Two at a time.
    (images, dict(dropout=0.1)),
    (texts, dict(dropout_attention=0.1)),
    (images, dict(drop_path=0.1)),
    (images, dict(keep_raw=True)),
    (texts, dict(keep_raw=True)),
    (images, dict(pool="mean")),
    (texts, dict(pool="map")),
  ],
)
def test_where_all_are_made(make, fields):
  net, args = make(**fields)
  more = dict(train=True)
  assert products(net, args, whole=False, **more) == products(net, args, **more)


def test_dropout_is_of_training():
  net, args = images(dropout=0.1, dropout_attention=0.1, drop_path=0.1)
  assert products(net, args, whole=False) < products(net, args)


def test_a_class_token_behind_the_text_has_its_own_way():
  net, args = texts(norm="pre", class_token="plain", attention="causal")
  found = shapes(net, args, whole=False)
  assert found.x.shape == (4, 7, 16)
  assert found.pooled.shape == (4, 16)


def test_attention_is_looked_at_in_all_layers():
  net, args = images()
  _, seen = shapes(net, args, whole=False, mutable=["attention"])
  (maps,) = jax.tree.leaves(seen)
  assert maps.shape == (2, 4, 2, 17, 17)


def test_queries_that_masks_know_apart():
  mask = jnp.tril(jnp.ones((3, 3), bool))[None, None]
  at = jnp.array([2, 0])
  want = [[[[True, True, True]]], [[[True, False, False]]]]
  np.testing.assert_array_equal(block.pick_queries(mask, at, 2), want)
  for same in (None, jnp.ones((2, 1, 1, 3), bool)):
    assert block.pick_queries(same, at, 2) is same


@pytest.fixture
def asked(monkeypatch):
  """What is asked of the towers, call by call: (method, all tokens are wanted)."""
  calls = []
  for kind in (ask.Live, ask.Teacher):

    def listen(self, module, method, *args, call=kind.__call__, **more):
      if method.startswith("encode_"):
        calls.append((method, more.get("whole", True)))
      return call(self, module, method, *args, **more)

    monkeypatch.setattr(kind, "__call__", listen)
  return calls


def contrast(**fields):
  """A dual encoder, by contrast alone."""
  model = tiny.model(unroll=2, **fields).clone(fusion=None)
  return pretrainer_lib.Pretrainer(model, dict(itc=itc.Objective()), dict(itc=1.0))


def both(whole):
  return [("encode_image", whole), ("encode_text", whole)]


def variables_of(made, given):
  """Their shapes."""
  return jax.eval_shape(lambda: tiny.init(made, given))


def test_embeddings_alone_are_read_of_contrast(asked):
  made = contrast()
  variables = variables_of(made, tiny.batch())
  asked.clear()
  jax.eval_shape(made.apply, variables, tiny.batch())
  assert asked == both(False)


@pytest.mark.parametrize("teacher", [False, True])
def test_tokens_are_read_of_what_is_fused(asked, teacher):
  made = tiny.albef(queue=0, distill=0.4 * teacher)
  variables = variables_of(made, tiny.batch())

  def run(variables):
    params = variables["params"] if teacher else None
    more = dict(teacher_params=params, train=True, rngs=tiny.rngs())
    return made.apply(variables, tiny.batch(), mutable=["memory"], **more)

  asked.clear()
  jax.eval_shape(run, variables)
  assert asked == both(True) * (1 + teacher)


def test_the_first_pass_of_accumulation_reads_embeddings(asked):
  """Of every method; the second reads tokens where an objective goes row by row."""
  made = tiny.albef(queue=0)
  variables = variables_of(made, tiny.batch())

  def embed(variables):
    more = dict(step=0, teacher_params=variables["params"], method="embed")
    return made.apply(variables, tiny.batch(), **more)

  asked.clear()
  jax.eval_shape(embed, variables)
  assert asked == both(False) * 2

  def rows(variables):
    return made.apply(variables, tiny.batch(), drawn={}, step=0, method="rows")

  asked.clear()
  jax.eval_shape(rows, variables)
  assert asked == both(False)


def test_objectives_of_users_get_all_tokens(asked):
  class Norms(nn.Module):
    @nn.compact
    def __call__(self, model, enc, batch, *, teacher=None, train=False):
      return reduce.Mean.of((enc.image.x**2).sum((1, 2))), {}

  objectives = dict(itc=itc.Objective(), norms=Norms())
  made = contrast().clone(objectives=objectives, weights=dict(itc=1.0, norms=0.1))
  variables = variables_of(made, tiny.batch())
  asked.clear()
  jax.eval_shape(made.apply, variables, tiny.batch())
  assert asked == both(True)


def test_each_kind_of_data_for_itself(asked):
  """A masked-language model on texts wants tokens there, not of the pairs."""
  words = text_mlm.Objective(vocab=tiny.VOCAB, width=16, rate=0.3)
  made = contrast().clone(
    objectives=dict(itc=itc.Objective(), mlm=words),
    weights=dict(itc=1.0, mlm=1.0),
    kinds=dict(mlm="texts"),
  )
  pairs = tiny.batch()
  texts = {name: pairs[name] for name in ("text", "text_mask")}
  given = dict(pairs=pairs, texts=texts)
  variables = variables_of(made, given)
  asked.clear()
  jax.eval_shape(lambda v: made.apply(v, given, rngs=tiny.rngs()), variables)
  assert asked[:3] == [*both(False), ("encode_text", True)]


def test_the_loss_is_the_same(monkeypatch):
  made = contrast()
  variables = tiny.init(made, tiny.batch())
  loss = lambda variables: made.apply(variables, tiny.batch())[0].value()
  found = {}
  for whole in (False, True):
    if whole:
      monkeypatch.setattr(block, "can_pick", lambda module, *, train: False)
    run = lambda variables: loss(variables)
    found[whole] = float(jax.jit(run)(variables)), flops.count(run, variables)
  assert found[False][0] == pytest.approx(found[True][0], rel=1e-6)
  assert found[False][1] < 0.9 * found[True][1]
