"""CLIP (Radford et al. 2021, arXiv:2103.00020) with a ViT or a residual network.

  python -m vlp_jax.train --config=configs/clip.py --workdir=runs/clip \
    --config.data.source.path=pairs.jsonl --config.tokenizer.path=FILE

FILE is bpe_simple_vocab_16e6.txt.gz of openai/CLIP. ViT-B/32, or `:B16`, `:L14`, and
`:L14_336`, which is one more epoch of L14 (`--config.init="{'type': 'clip', 'path':
'L14.pt'}"`); the residual networks `:RN50`, `:RN101`, `:RN50x4`, `:RN50x16` and
`:RN50x64` (init type 'clip_resnet'). Paper: 32 times 400 M pairs (WIT); L/14 took 256
V100 12 days, RN50x64 592 V100 18 days. Zero-shot ImageNet 63.3, 68.3, 75.5 and 76.6;
RN50 59.8, RN50x64 73.9; Flickr30k image retrieval R@1 58.8, 62.2, 65.0, 66.9 (OpenAI's
weights, measured by open_clip). Sizes: clip/model.py; optimiser: tables 18 to 20 of the
paper; `:tiny` and `:tiny_rn`: seconds on a CPU.
"""

from configs import parts

# image, patch, res, width of the text, E, peak learning rate
SIZES = {
  "": ("B", 32, 224, 512, 512, 5e-4),
  "B16": ("B", 16, 224, 512, 512, 5e-4),
  "L14": ("L", 14, 224, 768, 768, 4e-4),
  "L14_336": ("L", 14, 336, 768, 768, 2e-5),
  "RN50": ((3, 4, 6, 3), 64, 224, 512, 1024, 5e-4),  # with channels, not a patch
  "RN101": ((3, 4, 23, 3), 64, 224, 512, 512, 5e-4),
  "RN50x4": ((4, 6, 10, 6), 80, 288, 640, 640, 5e-4),
  "RN50x16": ((6, 8, 18, 8), 96, 384, 768, 768, 4e-4),
  "RN50x64": ((3, 15, 36, 10), 128, 448, 1024, 1024, 3.6e-4),
  "tiny": ("tiny", 8, 32, 32, 32, 1e-3),
  "tiny_rn": ((1, 2, 1, 1), 8, 32, 32, 32, 1e-3),
}


def get_config(arg=""):
  tiny = arg.startswith("tiny")
  image, patch, res, width, embed, lr = SIZES.get(arg, SIZES[""])
  c = parts.base(seed=0, batch_size=16 if tiny else 32_768)
  epoch = arg == "L14_336"
  c.total = "8 steps" if tiny else "4e8 examples" if epoch else "12.8e9 examples"
  file = "data/bpe_simple_vocab_16e6.txt.gz"
  c.tokenizer = dict(type="clip_bpe", path=file, length=16 if tiny else 77)
  sizes = dict(patch=patch, res=res, text=(width, 2 if tiny else 12), embed_dim=embed)
  c.model = parts.clip(image, **sizes, act="quick_gelu")
  # The official loss counts only a row's own pair as right.
  c.objectives = dict(itc=dict(targets="pair"))
  c.data = dict(source=dict(type="table", path="data/pairs.jsonl"))
  c.data.pp = f"decode|resize_shorter({res})|random_crop({res})"
  adam = {} if isinstance(image, str) else dict(b2=0.999, eps=1e-8)
  c.optim = parts.clip_optim(lr=lr, warmup="1 step" if tiny else "2000 steps", **adam)
  return parts.on_scenes(c, res) if tiny else c
