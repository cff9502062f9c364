"""A small ALBEF from scratch on Flickr8k: 6,000 photographs, five captions each.

  python -m vlp_jax.train --config=configs/flickr8k.py --workdir=runs/flickr8k \
    --config.data.source.dir=FOLDER

FOLDER is any copy of the official layout. The default fits 40 minutes on two CPU cores,
in which a momentum teacher only falls behind, and Muon learns faster than AdamW;
`:large` is for one GPU, where Muon was not tried, `:tiny` a trial.
"""

from configs import parts


def get_config(arg=""):
  large, tiny = arg == "large", arg == "tiny"
  res, length, drop = (224, 32, 0.1) if large else (96, 22, 0.0)
  act = "gelu" if large else "gelu_tanh"
  tower = parts.size("S" if large else "tiny" if tiny else "nano", init_std=None)
  c = parts.base(seed=0, batch_size=256 if large else 64)
  c.total = "100 epochs" if large else "20 steps" if tiny else "2200 steps"
  pieces = dict(train=dict(vocab_size=4_000, model_type="bpe"))
  c.tokenizer = dict(pieces, type="sentencepiece", length=length)
  # Convolutions see sooner than linear patches; norms before the layers learn faster.
  image = dict(tower, patch=16, res=res, stem="conv", drop_path=drop, act=act)
  words = dict(norm="pre", dropout=drop, act=act)
  order = dict(norm_pre=True, posemb="learned_sincos")
  text = dict(tower, depth=2, length=length, **order, **words)
  fusion = dict(type="cross_attention", depth=1 + large, init_std=None, **words)
  c.model = dict(image=dict(image, type="vit"), text=dict(text, type="text"))
  c.model.update(fusion=fusion, embed_dim=256 if large else 128, scale="log_scale")
  c.model.update(dtype="bfloat16" if large else "float32", unroll=6)
  soft = dict(distill=0.4, distill_ramp="20%") if large else {}
  itc, mlm = dict(soft, queue=4_096 * large), dict(soft, rate=0.25, max_masked=8)
  itm = dict(negatives="hard", layout="triples" if large else "half")
  c.objectives = dict(itc=itc, itm=itm, mlm=mlm)
  c.ema_decay = 0.995 if large else None
  augment = "flip|randaugment(2, 7)" if large else "flip|randaugment(1, 5)"
  crop = f"random_resized_crop({res}, min_area=0.3)"
  test = dict(source=dict(split="test"), pp=f"decode|resize({res})|clean(30)")
  source = dict(type="tfds", name="flickr8k", dir="data/flickr8k")
  c.data = dict(source=source, pp=f"decode|{crop}|{augment}|clean(30)")
  rule = dict(name="adamw", lr=6e-4) if large else dict(name="muon", lr=1.5e-3)
  c.optim = dict(rule, warmup="8%", b2=0.98, weight_decay=0.1, clip_norm=3.0)
  ranked = dict(rerank=16, add_similarity="scaled", batch_size=100, data=test)
  c.evals = dict(test=dict(type="retrieval", **ranked))
  c.checkpoint, c.log = dict(every="10%"), dict(every=10)
  return c
