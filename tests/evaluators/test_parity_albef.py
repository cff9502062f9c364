"""Re-ranked retrieval against the official code.

tests/reference/albef_retrieval.npz: what salesforce/ALBEF (commit b9727e4) Retrieval.py
`evaluation` computes with k_test=3 from random weights of models/model_retrieval.py,
float32 on a CPU; the weights under our names. Tolerance rtol 1e-4 with atol 1e-5 of the
array's largest value: float32 summed in another order.
"""

import pathlib

import numpy as np

from tests import tiny
from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.evaluators import retrieval
from vlp_jax.models import text
from vlp_jax.models import vit
from vlp_jax.models import vlm
from vlp_jax.models.fusion import cross_attention
from vlp_jax.objectives import itm

REFERENCE = pathlib.Path(__file__).parents[1] / "reference" / "albef_retrieval.npz"


def test_scores_of_the_official_evaluation(monkeypatch):
  data = np.load(REFERENCE)
  params = {}
  for name in data.files:
    if name.startswith("params/"):
      branch = params
      *folders, leaf = name.split("/")[1:]
      for folder in folders:
        branch = branch.setdefault(folder, {})
      branch[leaf] = data[name]
  bert = dict(num_heads=4, mlp_dim=48, norm_eps=1e-12)
  image = vit.Encoder(width=24, depth=2, num_heads=4, mlp_dim=96, patch=16, res=64)
  vocab = tiny.Vocab(size=200)
  model = vlm.VLM(
    image=image,
    text=text.Encoder(vocab=vocab, width=24, depth=2, length=40, **bert),
    fusion=cross_attention.Fusion(depth=2, **bert),
    embed_dim=24,
  )
  objectives = dict(itm=itm.Objective(width=24))
  images = dict(image=data["image"], image_id=np.arange(5), example_index=np.arange(5))
  texts = dict(
    text=data["text"].astype(np.int32),
    text_mask=data["text_mask"],
    image_id=data["text_to_image"],
    caption=[""] * 15,
  )
  read = retrieval.evaluation
  for name, batch in (("eval_images", images), ("eval_texts", texts)):
    batch |= {"valid": np.ones(len(batch["image_id"]), bool)}
    monkeypatch.setattr(read, name, lambda *a, batch=batch, **k: [batch])
  made = retrieval.Evaluator(rerank=3, pairs=8)
  made.setup(
    pretrainer=pretrainer_lib.Pretrainer(model, objectives, dict(itm=1.0)),
    source=None,
    tokenizer=None,
    pp="",
    mesh=None,
    batch_size=5,
  )
  got = made({"params": params})
  want = {k.removeprefix("expected/"): data[k] for k in data.files}
  similarity = want["image_embeds"] @ want["text_embeds"].T
  for ours, theirs in (
    (made.last.similarity, similarity),
    (made.last.score_i2t, want["score_i2t"]),
    (made.last.score_t2i, want["score_t2i"]),
  ):
    largest = np.abs(theirs[theirs != -100]).max()
    np.testing.assert_array_equal(ours == -100, theirs == -100)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * largest)
  # R@1 hangs on no tie between candidates that were not re-ranked.
  assert got["itm/i2t_r1"] == 0.0 and got["itm/t2i_r1"] == 100.0 * 2 / 15
