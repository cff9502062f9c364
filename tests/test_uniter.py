"""UNITER against slow, obvious numpy: the whole model, and each of its losses.

The oracle reads a random state dict of the official layout by its official names, and
computes what the paper (https://arxiv.org/abs/1909.11740, section 3) and the official
code (model/model.py, model/pretrain.py, model/ot.py) say, row by row without padding.
Tolerance rtol 1e-4 with atol 1e-5 of the array's largest value: ours is float32.
"""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.interop import test_uniter as layout
from vlp_jax import batch as batch_lib
from vlp_jax import build
from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.interop import reader
from vlp_jax.interop import uniter
from vlp_jax.objectives import itm
from vlp_jax.objectives import mlm
from vlp_jax.objectives import mrm
from vlp_jax.ops import tree

HEADS, BATCH, LENGTH, REGIONS = 4, 4, 7, 5
WIDTH, FEATURES, CLASSES = layout.WIDTH, layout.FEATURES, layout.CLASSES


@functools.cache
def pretrainer():
  """The method of configs/uniter.py, at the sizes of `layout`."""
  stack = dict(width=WIDTH, num_heads=HEADS, mlp_dim=layout.MLP)
  regions = dict(regions=REGIONS, features=FEATURES, classes=CLASSES)
  fusion = dict(type="merged", types=0, norm="post", norm_eps=1e-12)
  spec = dict(
    image=dict(type="normed_regions", width=WIDTH, **regions),
    text=dict(stack, type="text", depth=0, length=layout.LENGTH, types=1),
    fusion=dict(fusion, depth=layout.LAYERS),
    embed_dim=None,
  )
  heads = dict(
    itm=itm.Objective(
      width=WIDTH, negatives="random", layout="half", align=0.1, align_special=True
    ),
    mlm=mlm.Objective(vocab=tiny.VOCAB, width=WIDTH),
    mrfr=mrm.Objective(width=WIDTH, target="features"),
    mrc=mrm.Objective(width=WIDTH, target="distribution"),
  )
  model = build.model(spec, vocab=tiny.VOCAB, length=LENGTH)
  return pretrainer_lib.Pretrainer(model, heads, dict.fromkeys(heads, 1.0))


@functools.cache
def batch():
  rng = np.random.default_rng(1)
  words, count = np.array([7, 4, 6, 5]), np.array([5, 3, 1, 4])
  mask = np.arange(LENGTH) < words[:, None]
  real = np.arange(REGIONS) < count[:, None]
  rows = rng.normal(size=(BATCH, REGIONS, FEATURES + 7 + CLASSES + 1))
  rows[..., -CLASSES - 1 : -1] = rng.dirichlet(np.ones(CLASSES), (BATCH, REGIONS))
  rows[..., -1] = 1.0
  predicted = (rng.random((BATCH, LENGTH)) < 0.4) & mask
  hidden = (rng.random((BATCH, REGIONS)) < 0.5) & real
  assert predicted.sum() > 3 and hidden.sum() > 3
  return types.MappingProxyType(
    dict(
      image=np.where(real[..., None], rows, 0.0).astype(np.float32),
      text=np.where(mask, rng.integers(5, 60, mask.shape), 0).astype(np.int32),
      text_mask=mask,
      image_id=np.arange(BATCH, dtype=np.int32),
      corrupted=np.where(predicted, tiny.VOCAB.mask, 7).astype(np.int32),
      predicted=predicted,
      hidden=hidden,
      images=np.array([0, 3, 2, 1], np.int32),
      labels=np.array([1, 0, 1, 0], np.int32),
    )
  )


@pytest.fixture(scope="module")
def params(tmp_path_factory):
  path = tmp_path_factory.mktemp("uniter") / "uniter.safetensors"
  reader.save(path, layout.state())
  return uniter.load(path, num_heads=HEADS).params


def forward(self, batch):
  """Ours: losses with what is masked given, and fused tokens."""
  net, step = self.model, jnp.int32(0)
  live = pretrainer_lib.ask_lib.Live()
  enc = pretrainer_lib.encode(net, live, batch, step)
  fused = net.fuse(enc.image, enc.words)
  given = (batch["corrupted"], batch["text_mask"], batch["text"], batch["predicted"])
  images = jax.tree.map(lambda x: x[batch["images"]], enc.image)
  heads = self.objectives
  matched, metrics = heads["itm"].match(
    net, images, enc.words, batch["labels"], jnp.ones(BATCH), train=False
  )
  hidden = batch["hidden"]
  losses = dict(
    itm=matched,
    mlm=heads["mlm"].loss(net, enc, *given, None, train=False)[0],
    mrfr=heads["mrfr"].loss(net, enc, batch, hidden, train=False)[0],
    mrc=heads["mrc"].loss(net, enc, batch, hidden, train=False)[0],
  )
  losses = {name: loss.value() for name, loss in losses.items()}
  own = dict(text=fused.x, image=fused.image.x, pooled=fused.pooled)
  return sum(losses.values()), (losses | {"wpa": metrics["wpa"].value()}, own)


@pytest.fixture(scope="module")
def ours(params):
  inputs = {key: jnp.asarray(value) for key, value in batch().items()}
  run = lambda p: pretrainer().apply({"params": p}, inputs, method=forward)
  (_, (losses, arrays)), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
  return types.SimpleNamespace(losses=losses, grads=grads, **arrays)


# --- The oracle: float64, one row at a time, no padding ---


class Oracle:
  def __init__(self, state):
    self.state = {name: np.float64(x) for name, x in state.items()}

  def linear(self, name, x):
    return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

  def norm(self, name, x):
    centred = x - x.mean(-1, keepdims=True)
    x = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
    return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

  def text(self, ids):
    at = "uniter.embeddings"
    x = self.state[f"{at}.word_embeddings.weight"][ids]
    x = x + self.state[f"{at}.position_embeddings.weight"][: len(ids)]
    x = x + self.state[f"{at}.token_type_embeddings.weight"][0]
    return self.norm(f"{at}.LayerNorm", x)

  def image(self, rows, hidden):
    at = "uniter.img_embeddings"
    features, places = rows[:, :FEATURES], rows[:, FEATURES : FEATURES + 7]
    # The loader zeroes what is hidden, the model adds a vector to it.
    features = np.where(hidden[:, None], 0.0, features)
    mask = self.state[f"{at}.mask_embedding.weight"]
    features = features + mask[hidden.astype(int)]
    x = self.norm(f"{at}.img_layer_norm", self.linear(f"{at}.img_linear", features))
    x = x + self.norm(f"{at}.pos_layer_norm", self.linear(f"{at}.pos_linear", places))
    x = x + self.state["uniter.embeddings.token_type_embeddings.weight"][1]
    return self.norm(f"{at}.LayerNorm", x)

  def encode(self, ids, rows, hidden=None):
    """(fused words, fused regions) of one pair."""
    hidden = np.zeros(len(rows), bool) if hidden is None else hidden
    x = np.concatenate([self.text(ids), self.image(rows, hidden)])
    for i in range(layout.LAYERS):
      at = f"uniter.encoder.layer.{i}"
      q, k, v = (
        self.linear(f"{at}.attention.self.{name}", x).reshape(len(x), HEADS, -1)
        for name in ("query", "key", "value")
      )
      scores = np.einsum("lnh,snh->nls", q, k) / math.sqrt(q.shape[-1])
      mixed = np.einsum("nls,snh->lnh", softmax(scores), v).reshape(len(x), -1)
      y = self.linear(f"{at}.attention.output.dense", mixed)
      x = self.norm(f"{at}.attention.output.LayerNorm", x + y)
      y = self.linear(
        f"{at}.output.dense", gelu(self.linear(f"{at}.intermediate.dense", x))
      )
      x = self.norm(f"{at}.output.LayerNorm", x + y)
    return x[: len(ids)], x[len(ids) :]

  def pooled(self, words):
    return np.tanh(self.linear("uniter.pooler.dense", words[0]))

  def head(self, name, norm, x):
    return self.norm(norm, gelu(self.linear(name, x)))


def gelu(x):
  return 0.5 * x * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def ipot(x, y, beta=0.5, iterations=50):
  """Transport distance of rows x to rows y, cosine cost (model/ot.py)."""
  unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)
  cost = 1.0 - unit(x) @ unit(y).T
  kernel, plan = np.exp(-cost / beta), np.ones_like(cost)
  sigma = np.full(len(x), 1.0 / len(x))
  for _ in range(iterations):
    q = kernel * plan
    delta = 1.0 / (len(y) * (q.T @ sigma))
    sigma = 1.0 / (len(x) * (q @ delta))
    plan = sigma[:, None] * q * delta[None]
  return (cost * plan).sum()


@functools.cache
def oracle():
  return Oracle(layout.state())


def pair(b, image=None, ids="text"):
  """(ids, rows, hidden) of one pair, without padding."""
  given, image = batch(), b if image is None else image
  real = given["image"][image][:, -1] > 0
  ids = given[ids][b][given["text_mask"][b]]
  return ids, np.float64(given["image"][image][real]), given["hidden"][image][real]


def close(got, want, name=""):
  want = np.asarray(want)
  scale = np.abs(want).max()
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * scale, err_msg=name)


# --- The tests ---


def test_fused_tokens(ours):
  for b in range(BATCH):
    ids, rows, _ = pair(b)
    words, regions = oracle().encode(ids, rows)
    close(ours.text[b, : len(ids)], words)
    close(ours.image[b, : len(rows)], regions)
    close(ours.pooled[b], oracle().pooled(words))


def test_masked_words(ours):
  losses = []
  for b in range(BATCH):
    _, rows, _ = pair(b)
    ids = pair(b, ids="corrupted")[0]
    words, _ = oracle().encode(ids, rows)
    head = "cls.predictions.transform"
    x = oracle().head(f"{head}.dense", f"{head}.LayerNorm", words)
    table = oracle().state["uniter.embeddings.word_embeddings.weight"]
    logp = np.log(softmax(x @ table.T + oracle().state["cls.predictions.bias"]))
    for at in np.flatnonzero(batch()["predicted"][b]):
      losses.append(-logp[at, batch()["text"][b, at]])
  close(ours.losses["mlm"], np.mean(losses))


def hidden_regions():
  """(fused vector, row) of every hidden region: the text is whole."""
  for b in range(BATCH):
    ids, rows, hidden = pair(b)
    _, regions = oracle().encode(ids, rows, hidden)
    for at in np.flatnonzero(hidden):
      yield regions[at], rows[at]


def test_masked_region_features(ours):
  """L_MRFR: the squared error of what is read off the transposed projection."""
  squares = []
  for x, row in hidden_regions():
    x = oracle().head("feat_regress.net.0", "feat_regress.net.2", x)
    weight = oracle().state["uniter.img_embeddings.img_linear.weight"]
    predicted = x @ weight + oracle().state["feat_regress.bias"]
    squares.append((predicted - row[:FEATURES]) ** 2)
  close(ours.losses["mrfr"], np.mean(squares))


def classified(x):
  name = "region_classifier.net"
  return oracle().linear(f"{name}.3", oracle().head(f"{name}.0", f"{name}.2", x))


def test_masked_region_distributions(ours):
  """L_MRC-kl, and the mean over classes that the official code takes of it."""
  terms = []
  for x, row in hidden_regions():
    labels = row[FEATURES + 7 : -1]
    terms.append(labels * (np.log(labels) - np.log(softmax(classified(x)))))
  close(ours.losses["mrc"], np.mean(terms))


def test_masked_region_classes():
  """L_MRC: the most probable class but the first, which is the ground."""
  logits, labels, want = [], [], []
  for x, row in hidden_regions():
    logits.append(classified(x))
    labels.append(row[FEATURES + 7 : -1])
    # The ground is the most probable of some.
    labels[-1] = labels[-1] + np.eye(CLASSES)[0] * (len(labels) % 2)
    target = 1 + max(range(CLASSES - 1), key=lambda c: labels[-1][1 + c])
    want.append(-np.log(softmax(logits[-1])[target]))
  got = mrm.class_loss(jnp.float32(np.stack(logits)), jnp.float32(np.stack(labels)))
  close(got, want)
  assert (mrm.classes(jnp.float32(np.stack(labels))) > 0).all()


def test_matching_and_alignment(ours):
  """L_ITM and L_WRA: all tokens are aligned, matching pairs pulled together."""
  losses, distances = [], []
  pairs = zip(batch()["images"], batch()["labels"], strict=True)
  for b, (image, label) in enumerate(pairs):
    ids, rows, _ = pair(b, image)
    words, regions = oracle().encode(ids, rows)
    logits = oracle().linear("itm_output", oracle().pooled(words))
    losses.append(-np.log(softmax(logits)[label]))
    distances.append(ipot(words, regions) * (1 if label else -1))
  close(ours.losses["wpa"], np.mean(distances))
  close(ours.losses["itm"], np.mean(losses) + 0.1 * np.mean(distances))


def test_gradients_reach_all_that_is_used(ours):
  for path, gradient in tree.flatten(ours.grads).items():
    if not path.endswith("attn/key/bias"):  # softmax does not see it
      assert np.abs(gradient).max() > 0, path
  # What the tied matrix gets from regression comes to what it gets as a projection.
  exported = uniter.export(jax.tree.map(np.asarray, ours.grads))
  names = ("feat_regress.weight", "uniter.img_embeddings.img_linear.weight")
  np.testing.assert_array_equal(*(exported[name] for name in names))


def test_padding_changes_nothing(params, ours):
  inputs = {key: jnp.asarray(value) for key, value in batch().items()}
  real = inputs["image"][..., -1:] > 0
  inputs["image"] = jnp.where(real, inputs["image"], 3.0)
  inputs["image"] = inputs["image"].at[..., -1].set(real[..., 0])
  inputs["text"] = jnp.where(inputs["text_mask"], inputs["text"], 9)
  _, (losses, _) = jax.jit(
    lambda p: pretrainer().apply({"params": p}, inputs, method=forward)
  )(params)
  for name, loss in losses.items():
    close(loss, ours.losses[name], name)


def test_images_of_no_regions_are_refused():
  image = jnp.zeros((2, 16, 16, 3))
  with pytest.raises(ValueError, match=r"reads regions \[B, R, 29\].*\[2, 16, 16, 3\]"):
    jax.eval_shape(pretrainer().model.image.init, jax.random.key(0), image)
  plain = pretrainer_lib.Pretrainer(
    tiny.model(), dict(mrfr=mrm.Objective(width=16)), dict(mrfr=1.0)
  )
  with pytest.raises(ValueError, match="wants regions"):
    tiny.init(plain, tiny.batch(2))


def test_rows_of_another_width_are_told_before_compiling():
  spec = batch_lib.spec(2, (5, 29), LENGTH)
  data = types.SimpleNamespace(pp="regions(10, features=12, classes=10)")
  config = types.SimpleNamespace(data=data)
  job = types.SimpleNamespace(batch=spec, config=config, turns=None)
  given = {key: np.zeros(x.shape, x.dtype) for key, x in spec.items()}
  batch_lib.check(job, given)
  given["image"] = np.zeros((2, 5, 30), np.float32)
  with pytest.raises(ValueError) as error:
    batch_lib.check(job, given)
  for text in ("image is float32[5, 30]", "float32[5, 29]", "must be as model.image's"):
    assert text in str(error.value)
