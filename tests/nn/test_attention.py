"""One attention seam: every backend agrees with slow numpy and with the others."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.nn import attention
from vlp_jax.nn import axes
from vlp_jax.ops import mask as mask_lib

B, L, S, D, N = 2, 5, 7, 16, 4


def inputs(seed=0):
  rng = np.random.default_rng(seed)
  x = jnp.asarray(rng.normal(size=(B, L, D)), jnp.float32)
  memory = jnp.asarray(rng.normal(size=(B, S, D)), jnp.float32)
  mask = jnp.asarray(np.arange(S) < np.array([[4], [7]]))[:, None, None, :]
  return x, memory, mask


def slow(params, x, memory, mask):
  def heads(name, y):
    p = params[name]
    return np.einsum("bld,dnh->bnlh", y, p["kernel"]) + p["bias"][None, :, None, :]

  q, k, v = heads("query", x), heads("key", memory), heads("value", memory)
  logits = q @ k.transpose(0, 1, 3, 2) / np.sqrt(D // N)
  logits = np.where(mask, logits, -np.inf)
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  weights = weights / weights.sum(-1, keepdims=True)
  out = np.einsum("bnlh,nhd->bld", weights @ v, params["out"]["kernel"])
  return out + params["out"]["bias"], weights


def layer(backend, **fields):
  return attention.Attention(num_heads=N, backend=backend, init_std=None, **fields)


@pytest.mark.parametrize("backend", ["auto", "einsum", "xla", "tiled"])
def test_backends_agree_with_numpy(backend):
  x, memory, mask = inputs()
  variables = nn.unbox(layer(backend).init(jax.random.key(0), x, memory, mask))
  got = layer(backend).apply(variables, x, memory, mask)
  params = jax.tree.map(np.asarray, variables["params"])
  want, _ = slow(params, *map(np.asarray, (x, memory, mask)))
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_backends_have_the_same_gradients():
  x, memory, mask = inputs()
  variables = nn.unbox(layer("einsum").init(jax.random.key(0), x, memory, mask))
  plain, *others = [
    jax.grad(lambda v, b=backend: (layer(b).apply(v, x, memory, mask) ** 2).sum())(
      variables
    )
    for backend in ("einsum", "xla", "tiled")
  ]
  for other in others:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, other
    )


def test_weights_are_sown_and_sum_to_one():
  x, memory, mask = inputs()
  variables = nn.unbox(layer("auto").init(jax.random.key(0), x, memory, mask))
  _, sown = layer("auto").apply(variables, x, memory, mask, mutable=["attention"])
  (weights,) = sown["attention"]["weights"]
  params = jax.tree.map(np.asarray, variables["params"])
  _, want = slow(params, *map(np.asarray, (x, memory, mask)))
  np.testing.assert_allclose(weights, want, rtol=1e-4, atol=1e-6)


def test_gradient_of_a_probe_is_the_gradient_of_the_map():
  x, memory, mask = inputs()
  variables = nn.unbox(layer("auto").init(jax.random.key(0), x, memory, mask))

  def total(probe):
    out = layer("auto").apply(
      variables | {"perturbations": {"weights": probe}}, x, memory, mask
    )
    return out.sum()

  grad = jax.grad(total)(jnp.zeros((B, N, L, S)))
  params = jax.tree.map(np.asarray, variables["params"])
  value = np.einsum("bsd,dnh->bnsh", memory, params["value"]["kernel"])
  value = value + params["value"]["bias"][None, :, None, :]
  # d(sum of out) / d(weight of key s) = value_s . (sum over D of the out kernel).
  want = np.einsum("bnsh,nhd->bns", value, params["out"]["kernel"])
  np.testing.assert_allclose(
    grad, np.broadcast_to(want[:, :, None], grad.shape), rtol=1e-4, atol=1e-5
  )


def test_a_fast_backend_refuses_dropout():
  x, memory, mask = inputs()
  with pytest.raises(ValueError, match="cannot drop weights out"):
    layer("xla", dropout=0.1).init(
      {"params": jax.random.key(0)}, x, memory, mask, train=True
    )


def test_width_must_divide_into_heads():
  with pytest.raises(ValueError, match="not a multiple of num_heads"):
    attention.Attention(num_heads=3).init(jax.random.key(0), jnp.ones((1, 2, 16)))


@pytest.mark.parametrize(
  ("dtype", "head_dim", "platform", "backend"),
  [
    ("bfloat16", 64, "gpu", "cudnn"),
    ("bfloat16", 64, "tpu", "xla"),
    ("float32", 64, "gpu", "xla"),
    ("bfloat16", 60, "gpu", "xla"),
    ("bfloat16", 256, "gpu", "xla"),
    ("float32", 64, "cpu", "tiled"),
    ("bfloat16", 64, "cpu", "xla"),
  ],
)
def test_the_fastest_backend(dtype, head_dim, platform, backend, monkeypatch):
  monkeypatch.setattr(axes, "platform", lambda: platform)
  query = jax.ShapeDtypeStruct((2, 577, 4, head_dim), dtype)
  assert attention.fastest(query, query) == backend


def test_a_single_query_is_not_cudnns(monkeypatch):
  """It takes even lengths: keys and values would be copied for it."""
  monkeypatch.setattr(axes, "platform", lambda: "gpu")
  query, key = (jax.ShapeDtypeStruct((2, n, 4, 64), "bfloat16") for n in (1, 257))
  assert attention.fastest(query, key) == "xla"
  assert attention.fastest(key, query) == "cudnn"


def test_tiles_are_for_long_sequences_on_one_device(monkeypatch):
  monkeypatch.setattr(axes, "platform", lambda: "cpu")
  short, long = (jax.ShapeDtypeStruct((2, n, 4, 64), "float32") for n in (50, 577))
  assert attention.fastest(short, short) == "xla"
  assert attention.fastest(short, long) == "xla"
  with jax.set_mesh(jax.make_mesh((2,), ("data",))):
    assert attention.fastest(long, long) == "xla"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("length", "keys"), [(4, 6), (5, 7), (4, 7), (7, 7)])
def test_cudnn_is_asked_for_even_lengths_and_masks_of_every_query(
  length, keys, masked, monkeypatch
):
  plain = jax.nn.dot_product_attention

  def stand_in(query, key, value, mask=None, *, implementation, **lengths):
    """XLA's, of what JAX takes for cuDNN in training."""
    assert implementation == "cudnn"
    assert query.shape[1] % 2 == key.shape[1] % 2 == 0
    if mask is not None:
      assert mask.shape[2:] == (query.shape[1], key.shape[1])
    return plain(query, key, value, mask=mask, implementation="xla", **lengths)

  monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
  query, key, value = (
    jax.random.normal(jax.random.key(i), (2, n, 3, 8))
    for i, n in enumerate((length, keys, keys))
  )
  mask = jnp.arange(keys) < jnp.array([keys, 3])[:, None] if masked else None
  mask = None if mask is None else mask[:, None, None, :]

  def total(attend, *args):
    return jnp.sum(jnp.sin(attend(*args, mask)))

  def expected(query, key, value, mask):
    return plain(query, key, value, mask=mask, implementation="xla")

  found = jax.grad(total, (1, 2, 3))(attention.cudnn, query, key, value)
  wanted = jax.grad(total, (1, 2, 3))(expected, query, key, value)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, wanted)


def test_cudnn_is_told_how_many_keys_are_real(monkeypatch):
  plain = jax.nn.dot_product_attention

  def stand_in(*args, implementation, **lengths):
    assert implementation == "cudnn"
    return plain(*args, implementation="xla", **lengths)

  monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
  query, key, value = (
    jax.random.normal(jax.random.key(i), (2, 6, 3, 8)) for i in range(3)
  )
  mask = mask_lib.First(5)
  found = attention.cudnn(query, key, value, mask)
  seen = mask.seen(6)
  wanted = plain(query, key, value, mask=seen, implementation="xla")
  np.testing.assert_allclose(found, wanted, atol=1e-6)
  assert not np.allclose(found, plain(query, key, value), atol=1e-3)
