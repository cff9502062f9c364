"""CoCa (Yu et al. 2022, arXiv:2205.01917), in the architecture of open_clip.

  python -m vlp_jax.train --config=configs/coca.py --workdir=runs/coca \
    --config.data.source.path=pairs.jsonl

Sizes of the paper's table 1: CoCa-Base, `:large`; optimiser of its section 4.1. It took
5 days on 2,048 TPU v4, JFT-3B, ALIGN; Flickr30k zero-shot (Base) 89.8 TR@1, 76.8 IR@1.
As open_clip has it, the pooling's first query is the contrastive one (the paper has two
poolings), a decoder layer has two MLPs, and images are cropped to 0.9 of their area or
more. Departure: Adafactor without momentum.
"""

from configs import parts


def get_config(arg=""):
  tiny = arg == "tiny"
  name = "tiny" if tiny else "L" if arg == "large" else "B"
  res, patch, length, batch = (32, 8, 16, 16) if tiny else (288, 18, 76, 65_536)
  depth = 2 if tiny else 12
  c = parts.base(seed=0, batch_size=batch, total="4 steps" if tiny else "500000 steps")
  recipe = dict(vocab_size=64_000, model_type="unigram")
  c.tokenizer = dict(type="sentencepiece", length=length, train=recipe)
  clip = dict(norm="pre", norm_eps=1e-5)
  vit = dict(patch=patch, res=res, norm_pre=True, patch_bias=False)
  pool = dict(queries=9 if tiny else 256, query_heads=2 if tiny else 8)
  text = dict(depth=depth, length=length + 1, types=0, attention="causal", **clip)
  c.model = dict(
    image=parts.size(name, type="vit", **vit, **pool, **clip),
    text=parts.size(name, type="text", class_token="shifted", **text),
    fusion=dict(type="cross_attention", mlp_before=True, norm_memory=True, **clip),
    embed_dim=32 if tiny else 512,
    scale="log_scale",
    project_bias=False,
  )
  c.model.fusion.depth = depth
  c.objectives = dict(itc=dict(targets="pair", weight=1.0))
  c.objectives.lm = dict(weight=2.0, transform=False, tied=False, bias=False)
  c.data = dict(source=dict(type="table", path="data/pairs.jsonl"))
  c.data.pp = f"decode|random_resized_crop({res}, min_area=0.9)"
  c.optim = dict(name="adafactor", lr=8e-4, schedule="linear", weight_decay=0.01)
  c.optim.warmup = "1 step" if tiny else "2%"
  return c if not tiny else parts.on_scenes(c, res)
