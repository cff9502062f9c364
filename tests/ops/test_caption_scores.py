"""BLEU, ROUGE-L and CIDEr, against those of coco-caption."""

import json
import pathlib

import numpy as np
import pytest

from vlp_jax.ops import caption_scores
from vlp_jax.ops import ptb

REFERENCE = pathlib.Path(__file__).parents[1] / "reference" / "metric_caption"
# float64 on both sides, summed in another order.
CLOSE = dict(rtol=1e-12, atol=1e-12)
BLEU = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4")


@pytest.fixture(scope="module")
def captions():
  """(captions, references) as tokens, in the fixture's order of images."""
  texts = json.loads((REFERENCE / "captions_tokenized.json").read_text())
  order = sorted(texts["gts"], key=int)
  split = lambda text: text.split()
  return (
    [split(texts["res"][image]) for image in order],
    [[split(text) for text in texts["gts"][image]] for image in order],
  )


@pytest.fixture(scope="module")
def expected():
  return dict(np.load(REFERENCE / "expected.npz"))


def test_bleu(captions, expected):
  corpus, images = caption_scores.bleu(*captions)
  for n in range(4):
    name = f"Bleu_{n + 1}"
    np.testing.assert_allclose(images[:, n], expected[name], **CLOSE)
    np.testing.assert_allclose(corpus[n], expected[f"corpus/{name}"], **CLOSE)


@pytest.mark.parametrize(
  "name, score", [("ROUGE_L", caption_scores.rouge_l), ("CIDEr", caption_scores.cider)]
)
def test_scores_of_images(captions, expected, name, score):
  got = score(*captions)
  np.testing.assert_allclose(got, expected[name], **CLOSE)
  np.testing.assert_allclose(got.mean(), expected[f"corpus/{name}"], **CLOSE)


def test_fake_captions_of_coco():
  """coco-caption's own example, where its images are in val2017: with the tokens."""
  data = json.loads((REFERENCE / "coco_fakecap.json").read_text())
  ours = [ptb.tokenize(text) for text in data["captions"]]
  others = [[ptb.tokenize(text) for text in texts] for texts in data["references"]]
  got = dict(zip(BLEU, caption_scores.bleu(ours, others)[0], strict=True))
  got["ROUGE_L"] = caption_scores.rouge_l(ours, others).mean()
  got["CIDEr"] = caption_scores.cider(ours, others).mean()
  for name, value in got.items():
    np.testing.assert_allclose(value, data["expected"][name], **CLOSE, err_msg=name)


def test_by_hand():
  """One image of two: "a b" against "a c d", and "e" against itself."""
  ours, others = [["a", "b"], ["e"]], [[["a", "c", "d"]], [["e"]]]
  corpus, images = caption_scores.bleu(ours, others)
  # Two words of three are right; the text is 3 of 4 words long.
  np.testing.assert_allclose(corpus[0], 2 / 3 * np.exp(1 - 4 / 3), rtol=1e-6)
  np.testing.assert_allclose(images[1, 0], 1.0, rtol=1e-6)
  precision, recall, b = 1 / 2, 1 / 3, 1.2**2
  rouge = (1 + b) * precision * recall / (recall + b * precision)
  np.testing.assert_allclose(caption_scores.rouge_l(ours, others), [rouge, 1.0])
  # Of "a b" one word of two, of weight log 2 each, is one of three there.
  cosine = 1 / np.sqrt(2) / np.sqrt(3)
  cider = 10 * cosine / 4 * np.exp(-1 / 72)
  np.testing.assert_allclose(caption_scores.cider(ours, others), [cider, 2.5])


def test_texts_without_words():
  assert caption_scores.rouge_l([[]], [[["a"]]]) == [0.0]
  assert caption_scores.cider([[], ["a"]], [[["a"]], [["b"]]])[0] == 0.0
  assert caption_scores.bleu([[]], [[["a"]]])[0].max() < 1e-6
