"""SigLIP (Zhai et al. 2023, arXiv:2303.15343): sigmoid loss, pooling by attention.

  python -m vlp_jax.train --config=configs/siglip.py --workdir=runs/siglip \
    --config.data.source.path=pairs.jsonl --config.tokenizer.path=FILE

FILE is the SentencePiece model c4_en of 32,000 pieces. B/16 at 256 pixels, or
`:B16_224`, `:L16`, `:So400m14`: 40 G examples of WebLI; zero-shot ImageNet 76.7, 76.2,
80.5, 82.2, COCO image retrieval R@1 47.4, 47.2, 51.2, 50.8 (table 1 of SigLIP 2).
`:B16_384` and `:So400m14_384` are 5 G examples more of those, at a hundredth of the
learning rate and without decay: 78.6, 83.2. `:tiny`: seconds on a CPU.
The warm-up is SigLIP 2's, as the paper states none; big_vision's decay, 1e-4, is not
multiplied by the learning rate, ours is. Departures: AdamW where the paper has
Adafactor with momentum; kernels are drawn by their fan in.
"""

from configs import parts

# size of both towers, patch, res, longer training of a model at another resolution
SIZES = {
  "": ("B", 16, 256, False),
  "B16_224": ("B", 16, 224, False),
  "B16_384": ("B", 16, 384, True),
  "L16": ("L", 16, 256, False),
  "So400m14": ("So400m", 14, 224, False),
  "So400m14_384": ("So400m", 14, 378, True),
  "tiny": ("tiny", 8, 32, False),
}


def get_config(arg=""):
  tiny, (name, patch, res, more) = arg == "tiny", SIZES.get(arg, SIZES[""])
  c = parts.base(seed=0, batch_size=16 if tiny else 32_768)
  c.total = "8 steps" if tiny else "5e9 examples" if more else "40e9 examples"
  c.tokenizer = dict(type="sentencepiece", path="data/c4_en.model", rows="siglip")
  c.tokenizer.length = 16 if tiny else 64
  both = dict(act="gelu_tanh", norm_eps=1e-6, init_std=None)
  image = dict(type="vit", patch=patch, res=res, class_token=False, pool="map", **both)
  text = dict(type="text", types=0, norm="pre", see_padding=True, pool="last", **both)
  image, text = parts.size(name, **image), parts.size(name, **text)
  c.model = dict(image=image, text=text, embed_dim=image["width"], project=("text",))
  c.model.update(scale="log_scale", temperature=0.1)
  c.model.update(image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))
  c.objectives = dict(itc=dict(loss="sigmoid", bias=-10.0, targets="pair"))
  c.data = dict(source=dict(type="table", path="data/pairs.jsonl"))
  c.data.pp = f"decode|resize({res})"
  c.optim = dict(lr=1e-5 if more else 1e-3, b2=0.95, clip_norm=1.0, bounds=())
  c.optim.weight_decay = 0.0 if more else 0.1  # 1e-4 / lr: see above
  c.optim.undecayed = r"(?<!/kernel)$"  # big_vision decays kernels alone
  c.optim.warmup = "1 step" if tiny else "20000 steps"
  if tiny:
    parts.on_scenes(c, res).tokenizer.rows = "siglip"
  return c
