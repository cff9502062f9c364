"""All of ALBEF on pictures of 24 pixels, for tests of whole runs."""

import ml_collections


def get_config(arg=""):
  steps = int(arg or 24)
  sizes = dict(width=32, num_heads=2, mlp_dim=64, init_std=None, dropout=0.1)
  c = ml_collections.ConfigDict()
  c.batch_size = 16
  c.total = steps
  c.tokenizer = dict(
    type="sentencepiece", length=12, train=dict(vocab_size=120, model_type="bpe")
  )
  c.model = dict(
    image=dict(type="vit", patch=8, res=24, depth=1, **sizes),
    text=dict(type="text", depth=1, **sizes),
    fusion=dict(type="cross_attention", depth=1, init_std=None),
    embed_dim=16,
  )
  c.objectives = dict(
    # The queue holds the image ids of the whole run, in the order they were seen.
    itc=dict(queue=16 * steps, distill=0.4, distill_ramp="50%"),
    itm=dict(negatives="hard"),
    mlm=dict(rate=0.3, distill=0.4),
  )
  c.ema_decay = 0.9
  train = dict(type="scenes", split="train", size=300, res=24)
  c.data = dict(source=train, pp="decode|random_resized_crop(24, min_area=0.5)|flip")
  c.optim = dict(lr=1e-3, warmup=4, weight_decay=0.02, clip_norm=3.0)
  c.checkpoint = dict(every=3, keep=2)
  c.log = dict(every=1, tensorboard=False)
  return c
