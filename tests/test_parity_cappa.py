"""CapPa (arXiv:2306.07915) against slow numpy, in float64: its decoder, both ways.

Section 3 of the paper, and big_vision models/proj/cappa/cappa.py: pre-norm layers of
self-attention, cross-attention and an MLP, without biases; a caption is read from the
left, or, three times of four, predicted at once from [MASK] at every place.
"""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import test_parity_albef
from tests import tiny
from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.models import text
from vlp_jax.models import vit
from vlp_jax.models import vlm
from vlp_jax.models.fusion import cross_attention
from vlp_jax.objectives import lm

WIDTH, HEADS, LENGTH, ROWS, DEPTH = 16, 2, 7, 3, 2
EPS = 1e-6
SIZES = dict(num_heads=HEADS, mlp_dim=24, norm_eps=EPS, act="gelu_tanh")
close = test_parity_albef.close


def pretrainer(parallel=0.75):
  """The modules that configs/cappa.py names."""
  model = vlm.VLM(
    vit.Encoder(
      width=WIDTH, depth=1, patch=8, res=16, class_token=False, pool="mean", **SIZES
    ),
    text.Encoder(
      vocab=tiny.VOCAB,
      width=WIDTH,
      depth=0,
      length=LENGTH,
      types=0,
      norm="pre",
      **SIZES,
    ),
    cross_attention.Fusion(depth=DEPTH, norm="pre", bias=False, **SIZES),
    embed_dim=None,
  )
  head = lm.Objective(tiny.VOCAB, WIDTH, parallel=parallel, tied=False, transform=False)
  return pretrainer_lib.Pretrainer(model, dict(lm=head), dict(lm=1.0))


@pytest.fixture(scope="module")
def setting():
  """(batch, parameters, the image's tokens)."""
  rng = np.random.default_rng(0)
  ids = rng.integers(10, tiny.VOCAB.size, (ROWS, LENGTH)).astype(np.int32)
  mask = np.arange(LENGTH) < np.array([[7], [5], [4]])
  ids[:, 0] = tiny.VOCAB.cls
  batch = dict(
    image=jnp.asarray(rng.normal(size=(ROWS, 16, 16, 3)), jnp.float32),
    text=jnp.asarray(np.where(mask, ids, tiny.VOCAB.pad)),
    text_mask=jnp.asarray(mask),
    image_id=jnp.arange(ROWS),
  )
  module = pretrainer()
  keys = dict(params=jax.random.key(0), mask=jax.random.key(1))
  params = nn.unbox(module.init(keys, batch)["params"])
  noise = lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32)
  params = jax.tree.map(noise, params)
  run = lambda m, image: m.model.encode_image(image).x
  image = module.apply({"params": params}, batch["image"], method=run)
  return batch, params, np.float64(image)


def slow_norm(x, norm):
  mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
  return (x - mean) / np.sqrt(var + EPS) * norm["scale"] + norm.get("bias", 0.0)


def slow_attention(x, other, layer, visible):
  """One caption; `visible(t, s)`: whether place t looks at place s."""
  query, key, value = (
    np.einsum("ld,dnh->lnh", y, layer[name]["kernel"])
    for name, y in (("query", x), ("key", other), ("value", other))
  )
  out = np.zeros((len(x), HEADS, WIDTH // HEADS))
  for t, n in itertools.product(range(len(x)), range(HEADS)):
    seen = [s for s in range(len(other)) if visible(t, s)]
    scores = np.array([query[t, n] @ key[s, n] for s in seen]) / np.sqrt(WIDTH // HEADS)
    weights = np.exp(scores - scores.max())
    out[t, n] = (weights / weights.sum()) @ value[seen, n]
  return np.einsum("lnh,nhd->ld", out, layer["out"]["kernel"])


def slow_gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def slow_logits(params, image, ids, *, parallel):
  """[L - 1, V] of one caption, from the image's tokens [S, D] and all but its last."""
  params = jax.tree.map(np.float64, params)
  words, stack = params["model"]["text"], params["model"]["fusion"]
  given = np.full(LENGTH - 1, tiny.VOCAB.mask) if parallel else ids[:-1]
  x = words["word"]["embedding"][given] + words["position"]["embedding"][: LENGTH - 1]
  for i in range(DEPTH):
    layer = jax.tree.map(lambda leaf, i=i: leaf[i], stack["blocks"])
    y = slow_norm(x, layer["norm_attn"])
    x = x + slow_attention(y, y, layer["attn"], lambda t, s: parallel or s <= t)
    y = slow_norm(x, layer["norm_cross"])
    x = x + slow_attention(y, image, layer["cross"], lambda t, s: True)
    y = slow_norm(x, layer["norm_mlp"])
    y = slow_gelu(y @ layer["mlp"]["up"]["kernel"])
    x = x + y @ layer["mlp"]["down"]["kernel"]
  head = params["objectives_lm"]
  return slow_norm(x, stack["norm"]) @ head["out"]["kernel"] + head["bias"]


def slow_losses(setting, parallel):
  """[B]: the sum of each caption's losses; its padding does not count."""
  batch, params, image = setting
  sums = []
  for row in range(ROWS):
    ids, real = np.array(batch["text"][row]), np.array(batch["text_mask"][row])
    logits = slow_logits(params, image[row], ids, parallel=parallel)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    sums.append(-sum(logp[t, ids[t + 1]] for t in range(LENGTH - 1) if real[t + 1]))
  return np.array(sums)


@pytest.mark.parametrize("parallel", [False, True])
def test_the_decoder(setting, parallel):
  batch, params, image = setting

  def read(self, batch):
    head, ids = self.objectives["lm"], batch["text"][:, :-1]
    given, seen, attention = head.blank(ids, jnp.full(ROWS, parallel))
    tokens = self.model.encode_image(batch["image"])
    return head.logits(self.model, tokens, given, seen, attention=attention)

  run = jax.jit(lambda p: pretrainer().apply({"params": p}, batch, method=read))
  want = [
    slow_logits(params, image[row], np.array(batch["text"][row]), parallel=parallel)
    for row in range(ROWS)
  ]
  close(run(params), np.array(want))


def test_the_loss_of_both_ways(setting):
  """In training each caption is read one way or the other, in parallel 3 times of 4; in
  evaluation all are read from the left."""
  batch, params, _ = setting
  count = float(np.array(batch["text_mask"])[:, 1:].sum())
  ways = np.stack([slow_losses(setting, parallel) for parallel in (False, True)])
  module = pretrainer()

  @jax.jit
  def train(seed):
    rngs = dict(mask=jax.random.key(seed))
    return module.apply({"params": params}, batch, rngs=rngs, train=True)[0].value()

  evaluated = jax.jit(lambda p: module.apply({"params": p}, batch)[0].value())(params)
  np.testing.assert_allclose(evaluated, ways[0].sum() / count, rtol=1e-5)
  choices = list(itertools.product((0, 1), repeat=ROWS))
  sums = [sum(ways[way, row] for row, way in enumerate(c)) for c in choices]
  possible = np.array(sums) / count
  drawn = []
  for seed in range(100):
    away = np.abs(possible - train(seed)) / possible
    assert away.min() < 1e-5
    drawn.append(choices[away.argmin()])
  # 300 captions: the share's standard deviation is 0.025.
  assert abs(np.mean(drawn) - 0.75) < 0.08
  assert len(set(drawn)) > 4
