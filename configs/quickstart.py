"""A small ALBEF on rendered scenes: what `bash launch/quickstart.sh` runs.

python -m vlp_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

The stem, positions that start as sines, and Muon are not ALBEF's: with them it is
learned within minutes who has which colour and shape, and without them it is not. Every
second example in half of the pairs has the words of the one before, bound otherwise:
only beside each other can such two be told apart.
"""

from configs import parts


def get_config(arg=""):
  tiny = arg == "tiny"
  act = dict(act="gelu_tanh", init_std=None)
  width = dict(width=128, num_heads=4, mlp_dim=256, **act)
  c = parts.base(seed=0, batch_size=32, total="20 steps" if tiny else "1700 steps")
  c.tokenizer = dict(
    type="sentencepiece", length=16, train=dict(vocab_size=256, model_type="bpe")
  )
  c.model = dict(
    image=dict(type="vit", patch=16, res=48, depth=3, stem="conv_deep", **width),
    text=dict(type="text", depth=1, norm="pre", posemb="learned_sincos", **width),
    fusion=dict(type="cross_attention", depth=2, norm="pre", **act),
  )
  c.model.update(embed_dim=64, scale="log_scale", unroll=3)
  c.objectives = dict(
    itc=dict(queue=512, distill=0.4, distill_ramp="50%"),
    itm=dict(negatives="hard"),
    mlm=dict(rate=0.3, distill=0.4, distill_ramp="50%", max_masked=8),
  )
  c.ema_decay = 0.99
  builder = dict(res=48, train_size=40_000, rivalry=0.5)
  scenes = dict(type="tfds", name="scenes", builder=builder)
  held_out = dict(source=dict(split="val"), pp="decode")
  c.data = dict(source=scenes, pp="decode", block=2)
  c.optim = dict(
    name="muon", lr=1.5e-3, warmup="8%", b2=0.98, weight_decay=0.02, clip_norm=3.0
  )
  c.evals = dict(
    retrieval=dict(rerank=16, add_similarity="scaled", data=held_out),
    itm=dict(data=held_out),
    mlm=dict(data=held_out),
  )
  c.checkpoint = dict(every="20%", keep=2)
  c.log = dict(every=10)
  return c
