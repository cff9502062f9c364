"""The evaluators over a tiny real ALBEF: what they report is what the model says."""

import jax
import numpy as np
import pytest

from tests import tiny
from vlp_jax.evaluators import itm
from vlp_jax.evaluators import mlm
from vlp_jax.evaluators import retrieval

COUNT = 12


class Tokenizer:
  vocab = tiny.VOCAB

  def decode(self, ids):
    return " ".join(str(i) for i in ids)


@pytest.fixture(scope="module")
def albef():
  module = tiny.albef(queue=0, distill=0.0)
  return module, tiny.init(module, tiny.batch(4))["params"]


def batches(keys, batch_size, **extra):
  columns = tiny.batch(COUNT, seed=3) | {"example_index": np.arange(COUNT)} | extra
  for start in range(0, COUNT, batch_size):
    part = {k: v[start : start + batch_size] for k, v in columns.items() if k in keys}
    count = len(part["image_id"])
    rest = batch_size - count
    part = {k: np.concatenate([v, np.repeat(v[:1], rest, 0)]) for k, v in part.items()}
    yield part | {"valid": np.arange(batch_size) < count}


@pytest.fixture(autouse=True)
def data(monkeypatch):
  image = ("image", "image_id", "example_index")
  text = ("text", "text_mask", "image_id", "caption")
  captions = np.array([f"caption {i}" for i in range(COUNT)])
  read = retrieval.evaluation
  monkeypatch.setattr(
    read, "eval_images", lambda *a, batch_size, sizes: batches(image, batch_size)
  )
  monkeypatch.setattr(
    read,
    "eval_texts",
    lambda *a, batch_size: batches(text, batch_size, caption=captions),
  )
  monkeypatch.setattr(
    read, "eval_pairs", lambda *a, batch_size: batches(image + text, batch_size)
  )


def setup(made, module, batch_size=5, mesh=None):
  made.setup(
    pretrainer=module,
    source=range(COUNT),
    tokenizer=Tokenizer(),
    pp="",
    mesh=mesh,
    batch_size=batch_size,
  )
  return made


def test_retrieval_scores_are_the_heads(albef):
  module, params = albef
  made = setup(retrieval.Evaluator(rerank=COUNT, pairs=30), module)
  got = made({"params": params})
  inputs = tiny.batch(COUNT, seed=3)

  def direct(m):
    image = m.model.encode_image(inputs["image"])
    text = m.model.encode_text(inputs["text"], inputs["text_mask"])
    similarity = m.model.embed_image(image) @ m.model.embed_text(text).T
    i, t = np.divmod(np.arange(COUNT**2), COUNT)
    image = jax.tree.map(lambda x: x[i], image)
    text = jax.tree.map(lambda x: x[t], text)
    return similarity, m.objectives["itm"].score(m.model, image, text)

  similarity, score = module.apply({"params": params}, method=direct)
  # float32, summed in another order in batches of another size.
  np.testing.assert_allclose(made.last.similarity, similarity, atol=1e-5)
  np.testing.assert_allclose(
    made.last.score_i2t, np.reshape(score, (COUNT, COUNT)), atol=1e-5
  )
  np.testing.assert_array_equal(made.last.score_i2t, made.last.score_t2i.T)
  assert made.last.captions[3] == "caption 3" and 0.0 <= got["itm/mean"] <= 100.0


def test_a_mesh_changes_nothing(albef):
  module, params = albef
  count = len(jax.devices())
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
  size = 4 * count
  whole = setup(retrieval.Evaluator(rerank=3, pairs=10), module, size, mesh)
  alone = setup(retrieval.Evaluator(rerank=3, pairs=10), module)
  assert whole({"params": params}) == alone({"params": params})
  if count > 1:
    with pytest.raises(ValueError, match="not a multiple"):
      setup(itm.Evaluator(), module, count + 1, mesh)


def test_itm_and_mlm_run(albef):
  module, params = albef
  got = setup(itm.Evaluator(), module)({"params": params})
  assert got["accuracy"] == (got["true"] + got["random"]) / 2
  got = setup(mlm.Evaluator(words="all", mask="together"), module)({"params": params})
  assert got["gain"] == got["accuracy"] - got["accuracy_blank"]
