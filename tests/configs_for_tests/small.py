"""Something of every part, for tests of what is read and what is checked."""

import ml_collections

from configs import parts


def get_config(arg=""):
  c = ml_collections.ConfigDict()
  c.batch_size = 16
  c.total = "3 epochs" if arg == "short" else 30
  c.tokenizer = dict(type="wordpiece", path="vocab.txt", length=9)
  c.model = dict(
    image=parts.size("tiny", type="vit", patch=8, res=32),
    text=parts.size("tiny", type="text"),
    fusion=dict(type="cross_attention", depth=2),
  )
  c.objectives = dict(itc=dict(queue=64), itm=dict(weight=2.0))
  c.data = dict(source=dict(type="scenes"), pp="decode")
  c.optim = dict(lr=1e-4)
  c.evals = dict(
    val=dict(type="retrieval", every="1 epoch", data=dict(source=dict(type="scenes")))
  )
  return c
