"""Retrieval by all pairs against the official code of ViLT.

tests/reference/vilt_irtr: scores of images of several sizes with their own texts and
three others, by dandelin/ViLT modules/objectives.py compute_irtr. Tolerance as in
tests/test_parity_vilt.py.
"""

import numpy as np

from tests import test_parity_vilt as vilt_test
from vlp_jax.evaluators import retrieval


def test_scores_of_all_pairs(monkeypatch):
  inputs = vilt_test.arrays("vilt_irtr", "inputs")
  batch = {k: np.asarray(x) for k, x in vilt_test.task_batch(inputs).items()}
  count, others = batch["false_ids"].shape[:2]
  number = np.arange(count)
  every = lambda own, wrong: np.concatenate([own[:, None], wrong], 1).reshape(
    count * (1 + others), -1
  )
  images = dict(image_id=number, example_index=number, valid=np.ones(count, bool))
  images |= {key: batch[key] for key in ("image", "image_size")}
  texts = dict(
    text=every(batch["text"], batch["false_ids"]),
    text_mask=every(batch["text_mask"], batch["false_mask"]),
    image_id=np.repeat(number, 1 + others),
    caption=[""] * count * (1 + others),
    valid=np.ones(count * (1 + others), bool),
  )
  read = retrieval.evaluation
  monkeypatch.setattr(read, "eval_images", lambda *a, sizes, **k: [images])
  monkeypatch.setattr(read, "eval_texts", lambda *a, **k: [texts])
  objective = vilt_test.TASKS["vilt_irtr"]
  made = retrieval.Evaluator(all_pairs=True, objective="text_rank", pairs=8)
  made.setup(
    pretrainer=vilt_test.pretrainer(objective, max_patches=None),
    source=None,
    tokenizer=None,
    pp="decode|fit(80, 80, 16)",
    mesh=None,
    batch_size=count,
  )
  made({"params": vilt_test.params_of("vilt_irtr")})
  scores = made.last.score_i2t.reshape(count, count, 1 + others)
  expected = vilt_test.arrays("vilt_irtr", "expected")
  (name,) = [key for key in expected if not key.endswith("_loss")]
  vilt_test.close(scores[number, number], expected[name], name)
