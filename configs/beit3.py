"""BEiT-3 (Wang et al. 2022, arXiv:2208.10442): mask, then predict, on all data.

  python -m vlp_jax.train --config=configs/beit3.py --workdir=runs/beit3 \
    --config.tokenizer.path=beit3.spm --config.data.source.path=pairs.jsonl \
    --config.data.kinds.images.source.path=FOLDER \
    --config.data.kinds.texts.source.path=lines.txt

Each step reads 2,048 images, 2,048 texts and 2,048 pairs. Base (12 layers), `:large`,
or `:giant`, the paper's, whose last three layers have an expert of pairs (1.9 G; VQA
test-std 84.0, COCO CIDEr 147.6). The architecture is that of the released weights
(torchscale; `--config.init.rest="{'type': 'beit3', 'path': FILE, 'key': 'model',
'fresh': ('model/codebook/.*',)}"` reads them); their training code is not public, and
the numbers are the paper's, of giant. `:tiny`: seconds on a CPU, with a codebook of 32
codes that is drawn and not learned.

Departures: codes of BEiT v2's public tokenizer, ViT-B of 16 pixels, where theirs had a
ViT-L and is not public; for patches of 14 it reads images at 256 pixels. The start by
layers, 1 / sqrt(2 l), is left out, as every layer has its inner norms.
"""

from configs import parts

# size, layers with an expert of pairs, patch
SIZES = {
  "": ("B", 0, 16),
  "large": ("L", 0, 16),
  "giant": ("g-40", 3, 14),
}


def get_config(arg=""):
  tiny = arg == "tiny"
  name, pair_depth, patch = ("tiny", 0, 8) if tiny else SIZES.get(arg, SIZES[""])
  batch, steps, warmup = (16, 4, 1) if tiny else (2048, 1_000_000, 10_000)
  res, length = (32, 16) if tiny else (224, 64)
  c = parts.base(seed=0, batch_size=batch, total=steps)
  file = dict(path="data/beit3.spm", lower=False)
  c.tokenizer = dict(type="sentencepiece", length=length, **file)
  stack = parts.size(name)
  depths = dict(depth=stack.pop("depth"), pair_depth=pair_depth)
  codebook, hidden = parts.vqkd(res, patch, tiny=tiny)
  words = dict(length=1024, types=0, first_position=2, norm="pre")
  c.model = dict(
    image=dict(stack, type="vit", depth=0, patch=patch, res=res, mask_token=True),
    text=dict(stack, type="text", depth=0, **words),
    fusion=dict(type="experts", drop_path=0.1, **depths),
    codebook=codebook,
    embed_dim=None,
    **parts.HALF,
  )
  c.objectives = dict(mdm=dict(kind="pairs+images+texts", **hidden))
  parts.three_kinds(c, res, 0.5, tiny=tiny, turns=("pairs+images+texts",))
  c.optim = parts.frozen(lr=1e-3, warmup=warmup, weight_decay=0.05, b2=0.98, eps=1e-6)
  c.init = dict(codebook=parts.VQKD)
  return parts.on_scenes(c, res) if tiny else c
