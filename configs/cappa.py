"""CapPa (Tschannen et al. 2023, arXiv:2306.07915), as big_vision configures it.

  python -m vlp_jax.train --config=configs/cappa.py --workdir=runs/cappa \
    --config.data.source.path=pairs.jsonl

Numbers: big_vision configs/proj/cappa/pretrain.py (ViT-B/16); paper: WebLI, 0.9 B or
9 B examples on TPU. Three quarters of the captions are predicted in parallel; `:cap` is
the paper's Cap, which predicts none so. `:large` is L/14. Departures: Adafactor without
momentum and cap on b2, word embeddings drawn at 0.02 instead of 1.
"""

from configs import parts


def get_config(arg=""):
  tiny, large = arg == "tiny", arg == "large"
  name = "tiny" if tiny else "L" if large else "B"
  res, batch, length = (32, 16, 17) if tiny else (224, 8_192, 65)
  c = parts.base(seed=0, batch_size=batch, total="4 steps" if tiny else "366500 steps")
  # 64 predicted positions; [CLS] in front is what the decoder's shift puts there.
  recipe = dict(vocab_size=32_000, model_type="unigram", lower=False)
  c.tokenizer = dict(type="sentencepiece", length=length, lower=False, train=recipe)
  vit = dict(patch=14 if large else 16, res=res, class_token=False, pool="mean")
  c.model = dict(
    image=parts.size(name, type="vit", act="gelu_tanh", init_std=None, **vit),
    text=parts.size(name, type="text", depth=0, types=0, norm="pre"),
    fusion=dict(type="cross_attention", depth=2 if tiny else 6, norm="pre", bias=False),
    embed_dim=None,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
  )
  c.model.fusion.update(act="gelu_tanh", norm_eps=1e-6, init_std=None)
  parallel = 0.0 if arg == "cap" else 0.75
  c.objectives = dict(lm=dict(parallel=parallel, tied=False, transform=False))
  c.objectives.lm.init_std = 0.0
  c.data = dict(source=dict(type="table", path="data/pairs.jsonl"))
  c.data.pp = f"decode|resize({res})"
  # Kernels alone, by 1e-4, which big_vision does not multiply by lr: 1e-4 / 1e-3.
  decay = dict(weight_decay=0.1, undecayed=r"(?<!/kernel)$")
  c.optim = dict(name="adafactor", lr=1e-3, clip_norm=1.0, **decay)
  c.optim.warmup = "1 step" if tiny else "10000 steps"
  return c if not tiny else parts.on_scenes(c, res)
