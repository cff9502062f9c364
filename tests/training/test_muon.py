"""Muon against numpy: what is orthogonalised, at what size, and what stays Adam's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import tiny
from vlp_jax.ops import tree
from vlp_jax.training import muon
from vlp_jax.training import optim as optim_lib
from vlp_jax.training import step as step_lib

LR = 0.1


def params(seed=0):
  draw = np.random.default_rng(seed).normal
  make = lambda *shape: draw(size=shape).astype(np.float32)
  block = {
    "attn": {
      "query": {"kernel": make(2, 6, 2, 3)},
      "out": {"kernel": make(2, 2, 3, 6)},
    },
    "mlp": {"up": {"kernel": make(2, 6, 8), "bias": make(2, 8)}},
  }
  image = {"blocks": block, "stem": {"kernel_0": make(3, 3, 3, 4)}}
  return {"model": {"image": image, "word": {"embedding": make(5, 6)}}}


def run(steps=3, **fields):
  optim = optim_lib.Optim(
    **dict(name="muon", lr=LR, schedule="constant", bounds=()) | fields
  )
  now = params()
  tx, _ = optim_lib.make(optim, now, total_steps=10)
  state = tx.init(now)
  for step in range(steps):
    updates, state = tx.update(params(100 + step), state, now)
    now = optax.apply_updates(now, updates)
  return tree.flatten(now), state


def as_matrices(path, x):
  """[layers, in, out]"""
  x = np.asarray(x, np.float64)
  if "stem" in path:
    return x.reshape(1, -1, x.shape[-1])
  split = {"query": (2, 6, 6), "out": (2, 6, 6), "up": (2, 6, 8)}
  return x.reshape(next(shape for name, shape in split.items() if name in path))


def orthogonalised(matrix):
  """Jordan's five Newton-Schulz steps of the quintic, slowly."""
  x = matrix / np.linalg.norm(matrix)
  for _ in range(5):
    a = x @ x.T
    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
  return x


MATRICES = (
  "model/image/blocks/attn/query/kernel",
  "model/image/blocks/attn/out/kernel",
  "model/image/blocks/mlp/up/kernel",
  "model/image/stem/kernel_0",
)


@pytest.mark.parametrize("path", MATRICES)
def test_a_matrix_moves_by_its_orthogonalised_momentum(path):
  got = as_matrices(path, run()[0][path])
  want = as_matrices(path, tree.flatten(params())[path])
  momentum = np.zeros_like(want)
  for step in range(3):
    g = as_matrices(path, tree.flatten(params(100 + step))[path])
    momentum = 0.95 * momentum + 0.05 * g
    ahead = 0.95 * momentum / (1 - 0.95 ** (step + 2)) + 0.05 * g / (
      1 - 0.95 ** (step + 1)
    )
    size = 0.2 * max(want.shape[1:]) ** 0.5
    want = want - LR * size * np.stack([orthogonalised(m) for m in ahead])
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_an_update_is_as_large_as_adam_s():
  moved, _ = run(steps=1)
  for path in MATRICES:
    step = as_matrices(path, moved[path] - tree.flatten(params())[path])
    # Five steps leave singular values between 0.7 and 1.2 of an orthogonal matrix's,
    # and of a matrix that is not square, only the smaller side's are there.
    assert 0.1 * LR < np.sqrt(np.mean(step**2)) < 0.25 * LR, path


def test_all_else_is_adams():
  got, _ = run(weight_decay=0.3)
  adam, _ = run(weight_decay=0.3, name="adamw")
  for path in adam:
    same = np.array_equal(got[path], adam[path])
    assert same == (path not in MATRICES), path


def test_frozen_matrices_cost_no_memory():
  _, state = run(multipliers=(("/attn/", 0.0),))
  held = [path for path in tree.flatten(state) if "attn" in path]
  assert not held


def test_every_layer_of_a_real_model_is_orthogonalised():
  shapes = step_lib.abstract_params(tiny.albef(), tiny.batch())
  kernels = {
    path
    for path in tree.flatten(shapes)
    if "/blocks/" in path and path.endswith("kernel")
  }
  assert {path for path in tree.flatten(shapes) if muon.axes(path)} == kernels
  tx = muon.scale_by_muon(optax.scale_by_adam())
  now = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
  updates, _ = jax.eval_shape(tx.update, now, jax.eval_shape(tx.init, now))
  assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, now)


def test_what_only_has_the_name_of_an_attention_s_layer():
  assert muon.axes("model/codebook/encoder/blocks/attn/out/kernel")
  assert muon.axes("model/fusion/upper/blocks/cross_1/out/kernel")
  assert muon.axes("model/codebook/out/kernel") is None  # VQ-KD's, of two axes


def test_a_model_without_a_hidden_matrix():
  tx = muon.scale_by_muon(optax.scale_by_adam())
  with pytest.raises(ValueError, match='optim.name="muon": no parameter .* model/temp'):
    tx.init({"model": {"temp": np.float32(0.1)}})
