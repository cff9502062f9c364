"""A small ALBEF from scratch on Flickr8k: 6,000 photographs, five captions each.

  python -m vlp_jax.train --config=configs/flickr8k.py --workdir=runs/flickr8k \
    --config.data.source.dir=FOLDER

FOLDER is any copy of the official layout. The default fits 40 minutes on two CPU cores;
`:large` is for one GPU, `:tiny` a trial of seconds.
"""

from configs import parts


def get_config(arg=""):
  large, tiny = arg == "large", arg == "tiny"
  res, patch, length = (224, 16, 32) if large else (96, 16, 22)
  tower = parts.size("S" if large else "tiny" if tiny else "nano", init_std=None)
  c = parts.base(seed=0, batch_size=256 if large else 64)
  c.total = "100 epochs" if large else "20 steps" if tiny else "1800 steps"
  pieces = dict(vocab_size=4_000, model_type="bpe")
  c.tokenizer = dict(type="sentencepiece", length=length, train=pieces)
  # Convolutions see sooner than linear patches; norms before the layers learn faster.
  drop = 0.1 if large else 0.0
  words = dict(norm="pre", dropout=drop)
  c.model = dict(
    image=dict(tower, type="vit", patch=patch, res=res, stem="conv", drop_path=drop),
    text=dict(tower, type="text", depth=2, length=length, norm_pre=True, **words),
    fusion=dict(type="cross_attention", depth=1 + large, init_std=None, **words),
  )
  c.model.update(dtype="bfloat16" if large else "float32", unroll=6)
  c.model.update(embed_dim=256 if large else 128, scale="log_scale")
  c.objectives = dict(
    itc=dict(queue=1_152, distill=0.4, distill_ramp="20%"),
    itm=dict(negatives="hard"),
    mlm=dict(rate=0.25, distill=0.4, distill_ramp="20%", max_masked=8),
  )
  c.ema_decay = 0.995
  test = dict(source=dict(split="test"), pp=f"decode|resize({res})|clean(30)")
  crop = f"random_resized_crop({res}, min_area=0.3)|flip|randaugment(2, 7)"
  source = dict(type="tfds", name="flickr8k", dir="data/flickr8k")
  c.data = dict(source=source, pp=f"decode|{crop}|clean(30)")
  c.optim = dict(lr=1e-3, warmup="5%", b2=0.98, weight_decay=0.1, clip_norm=3.0)
  c.evals = dict(test=dict(type="retrieval", rerank=16, batch_size=100, data=test))
  c.checkpoint, c.log = dict(every="10%"), dict(every=10)
  return c
