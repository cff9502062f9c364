"""Late fusion: a ViT and a BERT, their features concatenated, a classifier of matches.

  python -m vlp_jax.train --config=configs/late_fusion.py --workdir=runs/late_fusion \
    --config.data.source.path=pairs.jsonl

The baseline that tutorials start with; no paper's, so the numbers are ours (BERT's
fine-tuning range, one GPU). What to expect: it learns to match, far below any fusion
whose words see the image. `:tiny` is the method in seconds on a CPU.
"""

from configs import parts
from configs import scratch


def get_config(arg=""):
  tiny = arg == "tiny"
  name, res, batch = ("tiny", 32, 16) if tiny else ("B", 224, 256)
  c = parts.base(seed=0, batch_size=batch, total="4 steps" if tiny else "10 epochs")
  drop = dict(dropout=0.1, dropout_attention=0.1)
  c.model = dict(
    image=parts.size(name, type="vit", patch=16, res=res),
    text=parts.size(name, type="text", length=512, **drop),
    fusion=dict(type="concat", dropout=0.1),
    embed_dim=None,
  )
  c.objectives = dict(itm=dict(negatives="random"))
  c.tokenizer = dict(type="wordpiece", path="bert-base-uncased", length=40)
  c.data = dict(source=dict(type="table", path="data/pairs.jsonl"))
  c.data.pp = f"decode|resize({res})"
  c.optim = dict(lr=5e-5, weight_decay=0.01, schedule="linear")
  c.optim.warmup = "1 step" if tiny else "10%"
  if not tiny:
    return c
  # Whether two vectors belong together, a layer on both can only tell by how its units
  # bend: by little at first, unless they are many and bend sharply.
  c.model.fusion.update(width=512, act="relu")
  return parts.on_scenes(scratch.from_nothing(c, batch=32), 48)
