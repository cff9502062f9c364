"""Retrieval with a model whose right answers are known."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.evaluators import fakes
from vlp_jax.evaluators import retrieval

SHADES = (10, 40, 80, 90, 100, 140, 170, 200, 230)


def evaluator(source=None, batch_size=4, pretrainer=None, mesh=None, **fields):
  made = retrieval.Evaluator(**fields)
  made.setup(
    pretrainer=pretrainer or fakes.pretrainer(),
    source=source or fakes.Source(SHADES),
    tokenizer=fakes.Tokenizer(),
    pp=fakes.PP,
    mesh=mesh,
    batch_size=batch_size,
  )
  return made


def test_a_right_model_finds_everything():
  got = evaluator(rerank=3)(fakes.variables())
  for way in ("i2t", "t2i"):
    for k in (1, 5, 10):
      assert got[f"itc/{way}_r{k}"] == got[f"itm/{way}_r{k}"] == 100.0
  assert got["itc/mean"] == got["itm/mean"] == 100.0
  assert got["chance/i2t_r1"] == pytest.approx(100 / 9)


def test_reranking_mends_what_itc_confuses():
  # Off by 13 shades, ITC takes a neighbour; ITM is not off.
  itc = evaluator()(fakes.variables(wrong=13.0))
  both = evaluator(rerank=3)(fakes.variables(wrong=13.0))
  assert set(itc) < set(both) and "itm/mean" not in itc
  assert {k: both[k] for k in itc} == itc
  assert itc["itc/t2i_r1"] < 80.0
  assert both["itm/t2i_r1"] == both["itm/i2t_r1"] == 100.0


def test_scores_are_itm_logits_of_the_candidates_and_minus_100_elsewhere():
  made = evaluator(rerank=2, pairs=4)
  made(fakes.variables(wrong=13.0))
  last = made.last
  shades = np.array(SHADES, np.float32)
  logits = 0.5 - np.abs(shades[:, None] - shades[None, :])
  for score, similarity in (
    (last.score_i2t, last.similarity),
    (last.score_t2i, last.similarity.T),
  ):
    top = np.argsort(similarity, axis=1)[:, -2:]
    want = np.full(score.shape, -100.0)
    np.put_along_axis(want, top, np.take_along_axis(logits, top, 1), 1)
    np.testing.assert_allclose(score, want, rtol=1e-6)


@pytest.mark.parametrize(
  "how, scale, shift", [("as_is", 1.0, 0.0), ("scaled", 1 / fakes.TEMPERATURE, 1.0)]
)
def test_similarity_can_be_added_to_the_logit(how, scale, shift):
  alone, added = evaluator(rerank=2), evaluator(rerank=2, add_similarity=how)
  alone(fakes.variables()), added(fakes.variables())
  ranked = alone.last.score_i2t > -100
  difference = added.last.score_i2t - alone.last.score_i2t
  joined = (alone.last.similarity + shift) * scale
  np.testing.assert_allclose(difference, np.where(ranked, joined, 0.0), atol=2e-5)


def test_a_head_that_knows_nothing_leaves_the_order_of_itc():
  # All logits are 0: ITM has learned that ITC's softmax is right.
  class Undecided(fakes.Itm):
    def logits(self, model, image, text):
      return jnp.zeros((image.x.shape[0], 2))

  made = evaluator(
    pretrainer=fakes.pretrainer(itm=Undecided()), rerank=5, add_similarity="scaled"
  )
  got = made(fakes.variables(wrong=13.0))
  assert got["itc/t2i_r1"] == got["itm/t2i_r1"] < 80.0
  assert got["itc/i2t_r1"] == got["itm/i2t_r1"]


@pytest.mark.parametrize("captions, rerank", [(1, 3), (3, 5), (3, 99)])
def test_numbers_do_not_depend_on_batches(captions, rerank):
  source = fakes.Source(SHADES, captions=captions)
  got = [
    evaluator(source, batch_size=b, rerank=rerank, pairs=p)(fakes.variables(wrong=20.0))
    for b, p in ((1, 1), (4, 7), (32, 512))
  ]
  assert got[0] == got[1] == got[2]


def test_nothing_is_compiled_twice():
  made = evaluator(fakes.Source(SHADES, captions=2), rerank=4, pairs=8)
  made(fakes.variables())
  made(fakes.variables(wrong=3.0))
  for fn in (made._encode_images.encode, made._encode_texts.encode, made._score.fuse):
    assert fn._cache_size() == 1


def test_examples_of_one_image_are_one_image():
  # Rows 0 and 2 are the same picture, each with its own caption.
  source = fakes.Source((50, 90, 50, 130), ids=(7, 3, 7, 5))
  made = evaluator(source)
  got = made(fakes.variables())
  np.testing.assert_array_equal(made.last.image_id, [7, 3, 5])
  np.testing.assert_array_equal(made.last.example_index, [0, 1, 3])
  np.testing.assert_array_equal(made.last.text_to_image, [0, 1, 0, 2])
  assert made.last.captions == ("shade s50", "shade s90", "shade s50", "shade s130")
  assert got["itc/mean"] == 100.0


def test_match_leaves_out_what_has_no_partner():
  images, texts, owner = retrieval.match(np.array([4, 9, 4, 2]), np.array([2, 4, 8, 2]))
  np.testing.assert_array_equal(images, [0, 3])
  np.testing.assert_array_equal(texts, [0, 1, 3])
  np.testing.assert_array_equal(owner, [1, 0, 1])
  with pytest.raises(ValueError, match="no image of the data source has a caption"):
    retrieval.match(np.array([1]), np.array([2]))


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(rerank=-1), "rerank=-1"),
    (dict(rerank=4, pairs=0), "pairs=0"),
    (dict(rerank=4, objective="itn"), 'objective="itn".*itm'),
    (dict(batch_size=0), "batch_size=0"),
  ],
)
def test_wrong_fields(fields, message):
  with pytest.raises(ValueError, match=message):
    evaluator(**fields)


def test_all_pairs_without_a_contrastive_space(monkeypatch):
  """Every pair is scored by the objective, in blocks, and nothing else ranks."""
  monkeypatch.setattr(retrieval, "BLOCK", 20)  # two images of nine texts
  model = fakes.Model(embed_dim=None)
  pretrainer = fakes.Pretrainer(model, {"text_rank": fakes.Itm()})
  made = evaluator(
    pretrainer=pretrainer, all_pairs=True, objective="text_rank", pairs=7
  )
  got = made(fakes.variables(wrong=13.0))
  shades = np.array(SHADES, np.float32)
  want = 0.5 - np.abs(shades[:, None] - shades)
  np.testing.assert_allclose(made.last.score_i2t, want, rtol=1e-6)
  np.testing.assert_array_equal(made.last.score_t2i, made.last.score_i2t.T)
  assert made.last.similarity is None
  assert got["all/mean"] == 100.0 and "itc/mean" not in got


def test_a_model_is_asked_only_for_what_it_has():
  bare = fakes.Pretrainer(fakes.Model(embed_dim=None), {"itm": fakes.Itm()})
  with pytest.raises(ValueError, match="no contrastive space.*say all_pairs=True"):
    evaluator(pretrainer=bare, rerank=2)
  with pytest.raises(ValueError, match="all_pairs=True leaves nothing to rerank=2"):
    evaluator(all_pairs=True, rerank=2)
  with pytest.raises(ValueError, match='objective="mlm" is of another kind, without'):
    evaluator(all_pairs=True, objective="mlm")
