"""CLIP (Radford et al. 2021, arXiv:2103.00020) with a Vision Transformer.

  python -m vlp_jax.train --config=configs/clip.py --workdir=runs/clip \
    --config.data.source.path=pairs.jsonl --config.tokenizer.path=FILE

FILE is bpe_simple_vocab_16e6.txt.gz of openai/CLIP. ViT-B/32, or `:B16`, `:L14`, and
`:L14_336`, which is one more epoch of L14 (`--config.init="{'type': 'clip', 'path':
'L14.pt'}"`). Paper: 32 times 400 M pairs (WIT); L/14 took 256 V100 12 days. Zero-shot
ImageNet 63.3, 68.3, 75.5 and 76.6; Flickr30k image retrieval R@1 58.8, 62.2, 65.0, 66.9
(OpenAI's weights, measured by open_clip). Sizes: clip/model.py; optimiser: tables 18 to
20 of the paper; `:tiny`: seconds on a CPU.
"""

from configs import parts

# image, patch, res, width of the text, E, peak learning rate
SIZES = {
  "": ("B", 32, 224, 512, 512, 5e-4),
  "B16": ("B", 16, 224, 512, 512, 5e-4),
  "L14": ("L", 14, 224, 768, 768, 4e-4),
  "L14_336": ("L", 14, 336, 768, 768, 2e-5),
  "tiny": ("tiny", 8, 32, 32, 32, 1e-3),
}


def get_config(arg=""):
  tiny = arg == "tiny"
  image, patch, res, width, embed, lr = SIZES.get(arg, SIZES[""])
  c = parts.base(seed=0, batch_size=16 if tiny else 32_768)
  epoch = arg == "L14_336"
  c.total = "8 steps" if tiny else "4e8 examples" if epoch else "12.8e9 examples"
  file = "data/bpe_simple_vocab_16e6.txt.gz"
  c.tokenizer = dict(type="clip_bpe", path=file, length=16 if tiny else 77)
  text = (width, 2 if tiny else 12)
  c.model = parts.clip(
    image, patch=patch, res=res, text=text, embed_dim=embed, act="quick_gelu"
  )
  # The official loss counts only a row's own pair as right.
  c.objectives = dict(itc=dict(targets="pair"))
  c.data = dict(source=dict(type="table", path="data/pairs.jsonl"))
  c.data.pp = f"decode|resize_shorter({res})|random_crop({res})"
  c.optim = parts.clip_optim(lr=lr, warmup="1 step" if tiny else "2000 steps")
  return parts.on_scenes(c, res) if tiny else c
