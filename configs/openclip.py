"""CLIP as open_clip trains it on LAION and DataComp (arXiv:2212.07143, 2304.14108).

  python -m vlp_jax.train --config=configs/openclip.py --workdir=runs/openclip \
    --config.data.source.path=pairs.jsonl --config.tokenizer.path=FILE

FILE is bpe_simple_vocab_16e6.txt.gz. ViT-B/32 on 32 times LAION-400M, or `:B16`,
`:L14`: zero-shot ImageNet 62.9, 67.1, 72.8 on 128, 176 and 400 A100. DataComp's presets
(its scale_configs.py): `:small`, `:medium`, `:large`, `:xlarge`, where unfiltered data
give 2.5, 17.6, 45.9, 72.3, and the best filter (DataComp-1B) 79.2. `:tiny`: seconds.
Learning rate of L/14: of the run at batches of 86,016, see cards/openclip.toml.
"""

from configs import parts

# image, patch, text width, activation, batch, peak lr, warm-up, b2, length
SIZES = {
  "": ("B", 32, 512, "quick_gelu", 32_768, 5e-4, 2_000, 0.98, "12.8e9 examples"),
  "B16": ("B", 16, 512, "gelu", 33_792, 5e-4, 2_000, 0.98, "12.8e9 examples"),
  "L14": ("L", 14, 768, "gelu", 38_400, 1e-3, 2_000, 0.98, "12.8e9 examples"),
  "small": ("B", 32, 512, "gelu", 4_096, 5e-4, 500, 0.98, "12.8e6 examples"),
  "medium": ("B", 32, 512, "gelu", 4_096, 5e-4, 500, 0.98, "128e6 examples"),
  "large": ("B", 16, 512, "gelu", 8_192, 5e-4, 500, 0.98, "1.28e9 examples"),
  "xlarge": ("L", 14, 768, "gelu", 90_112, 1e-3, 10_000, 0.95, "12.8e9 examples"),
  "tiny": ("tiny", 8, 32, "gelu", 16, 1e-3, 1, 0.98, "8 steps"),
}


def get_config(arg=""):
  image, patch, width, act, batch, lr, warmup, b2, total = SIZES.get(arg, SIZES[""])
  tiny = arg == "tiny"
  c = parts.base(seed=0, batch_size=batch, total=total)
  file, res = "data/bpe_simple_vocab_16e6.txt.gz", 32 if tiny else 224
  c.tokenizer = dict(type="clip_bpe", path=file, length=16 if tiny else 77)
  text = (width, 2 if tiny else 12)
  c.model = parts.clip(image, patch=patch, res=res, text=text, embed_dim=width, act=act)
  c.objectives = dict(itc=dict(targets="pair"))
  c.data = dict(source=dict(type="table", path="data/pairs.jsonl"))
  c.data.pp = f"decode|random_resized_crop({res}, min_area=0.9)"
  c.optim = parts.clip_optim(lr=lr, warmup=f"{warmup} steps", b2=b2)
  return parts.on_scenes(c, res) if tiny else c
