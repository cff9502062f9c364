"""Self-distillation and masked prediction against slow numpy: the papers' equations."""

import math
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.models import vit
from vlp_jax.models import vlm
from vlp_jax.nn import ask
from vlp_jax.nn import prototypes
from vlp_jax.objectives import masked_patches
from vlp_jax.objectives import self_distill
from vlp_jax.ops import distill

HEAD = dict(prototypes=6, hidden=5, bottleneck=4)


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def slow_loss(student, teacher, center):
  """Equation 1 of DINO, of one pair of score vectors."""
  target = softmax((teacher - center) / 0.04)
  given = softmax(student / 0.1)
  return -sum(t * np.log(s) for t, s in zip(target, given, strict=True))


def slow_head(params, x):
  """DINOHead of one vector."""
  erf = np.vectorize(math.erf)
  for i in range(3):
    if i:
      x = 0.5 * x * (1 + erf(x / np.sqrt(2)))
    x = x @ params[f"dense_{i}"]["kernel"] + params[f"dense_{i}"]["bias"]
  x = x / np.linalg.norm(x)
  return np.array([x @ w / np.linalg.norm(w) for w in params["prototypes"]])


def setting(objective, name):
  """Pretrainer of one objective and a small ViT, parameters, a teacher's, a batch."""
  image = vit.Encoder(
    width=8,
    depth=1,
    num_heads=2,
    mlp_dim=8,
    patch=4,
    res=8,
    class_token=False,
    pool="map",
    mask_token=True,
  )
  model = vlm.VLM(image, None, embed_dim=None)
  whole = pretrainer_lib.Pretrainer(model, {name: objective}, {name: 1.0})
  pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
  batch = dict(image=jnp.asarray(pixels))

  def forward(self, step, teacher_params, train):
    teacher = None if teacher_params is None else ask.Teacher(teacher_params)
    enc = types.SimpleNamespace(step=jnp.asarray(step))
    one = self.objectives[name]
    loss, _ = one(self.model, enc, batch, teacher=teacher, train=train)
    return loss.value()

  rngs = dict(params=jax.random.key(1), sample=jax.random.key(2))
  init = lambda rngs: whole.init(rngs, 0, None, False, method=forward)
  variables = jax.jit(init)(rngs)
  params = jax.tree.map(np.asarray, nn.unbox(variables["params"]))
  draw = np.random.default_rng(3)
  teacher = jax.tree.map(
    lambda x: x + 0.1 * draw.normal(size=x.shape).astype(x.dtype), params
  )
  center = np.linspace(-0.02, 0.02, 6).astype(np.float32)
  memory = {f"objectives_{name}": dict(center=jnp.asarray(center))}

  def run(params, step=0, teacher=teacher):
    return whole.apply(
      {"params": params, "memory": memory},
      step,
      teacher,
      True,
      method=forward,
      rngs=dict(sample=jax.random.key(4)),
      mutable=["memory"],
    )

  return types.SimpleNamespace(
    whole=whole, params=params, teacher=teacher, center=center, batch=batch, run=run
  )


def captured(monkeypatch):
  """The arguments that the loss is called with."""
  calls = []
  true = distill.consistency

  def spy(*args, **kwargs):
    calls.append((*args, kwargs))
    return true(*args, **kwargs)

  monkeypatch.setattr(distill, "consistency", spy)
  return calls


@pytest.mark.parametrize("name", ["self_distill", "masked_patches"])
def test_the_loss_is_the_equation(name, monkeypatch):
  objective = {
    "self_distill": self_distill.Objective(views=2, res=4, **HEAD),
    "masked_patches": masked_patches.Objective(**HEAD),
  }[name]
  s = setting(objective, name)
  calls = captured(monkeypatch)
  loss, new = s.run(s.params)
  student, teacher, center, _ = calls[-1]
  count = 2  # views, or hidden ones of four patches
  assert student.shape == (3, count, 6)
  teacher = np.broadcast_to(teacher, student.shape)
  np.testing.assert_array_equal(center, s.center)
  want = [
    slow_loss(np.float64(student[i, j]), np.float64(teacher[i, j]), s.center)
    for i in range(3)
    for j in range(count)
  ]
  np.testing.assert_allclose(loss, np.mean(want), rtol=1e-4)
  # The center follows the teacher's scores.
  got = new["memory"][f"objectives_{name}"]["center"]
  mean = np.float64(teacher).reshape(-1, 6).mean(axis=0)
  np.testing.assert_allclose(got, 0.9 * s.center + 0.1 * mean, rtol=1e-4, atol=1e-7)
  # Without a teacher there is nothing to say in training.
  with pytest.raises(ValueError, match=f"objectives.{name} wants a teacher"):
    s.run(s.params, teacher=None)


def test_the_head_and_the_views():
  s = setting(self_distill.Objective(views=2, res=4, **HEAD), "self_distill")

  def scores(self, x):

    return self.model.image.pooled(self.model.encode_image(x))

  # One global view's scores, by the parts the objective is made of.
  vectors = s.whole.apply({"params": s.params}, s.batch["image"], method=scores)
  head = s.params["objectives_self_distill"]["head"]
  got = prototypes.Prototypes(6, 5, 4).apply({"params": head}, vectors[:, None])[:, 0]
  want = [slow_head(head, np.float64(v)) for v in np.asarray(vectors)]
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["self_distill", "masked_patches"])
def test_it_begins_at_its_step_and_teaches_the_model_alone(name):
  objective = {
    "self_distill": self_distill.Objective(views=1, res=4, start=5, **HEAD),
    "masked_patches": masked_patches.Objective(start=5, **HEAD),
  }[name]
  s = setting(objective, name)
  assert s.run(s.params, step=4)[0] == 0.0 < s.run(s.params, step=5)[0]
  grads = jax.grad(lambda p: s.run(p, step=5)[0])(s.params)
  image = grads["model"]["image"]
  assert np.abs(image["patch"]["kernel"]).max() > 0
  assert (np.abs(image["mask"]).max() > 0) == (name == "masked_patches")
  to_teacher = jax.grad(lambda t: s.run(s.params, step=5, teacher=t)[0])(s.teacher)
  assert all(np.abs(x).max() == 0 for x in jax.tree.leaves(to_teacher))


def test_a_window_is_what_it_says():
  image = np.random.default_rng(0).uniform(size=(2, 8, 8, 3)).astype(np.float32)
  full = jnp.asarray([[0.0, 0.0, 1.0, 1.0]] * 2)
  np.testing.assert_allclose(distill.crop(image, full, 8), image, rtol=1e-6)
  quarter = jnp.asarray([[0.5, 0.25, 0.5, 0.5], [0.0, 0.0, 0.5, 0.5]])
  got = distill.crop(image, quarter, 4)
  np.testing.assert_allclose(got[0], image[0, 4:, 2:6], rtol=1e-6)
  np.testing.assert_allclose(got[1], image[1, :4, :4], rtol=1e-6)
  drawn = np.asarray(distill.windows(jax.random.key(0), 500, area=(0.05, 0.4)))
  assert (drawn[:, :2] >= 0).all() and (drawn[:, :2] + drawn[:, 2:] <= 1 + 1e-6).all()
  area = drawn[:, 2] * drawn[:, 3]
  assert 0.05 - 1e-6 < area.min() and area.max() < 0.4 + 1e-6
  at, hidden = masked_patches.hide(jax.random.key(0), 5, 16, 0.5)
  assert (np.asarray(hidden).sum(axis=1) == 8).all()
  assert np.take_along_axis(np.asarray(hidden), np.asarray(at), axis=1).all()
  with pytest.raises(ValueError, match="hides 16 of 16 patches"):
    masked_patches.hide(jax.random.key(0), 5, 16, 1.0)
