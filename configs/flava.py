"""FLAVA (Singh et al. 2022, arXiv:2112.04482): images, texts and pairs in turns.

  python -m vlp_jax.train --config=configs/flava.py --workdir=runs/flava \
    --config.data.source.path=pairs.jsonl \
    --config.data.kinds.images.source.path=FOLDER \
    --config.data.kinds.texts.source.path=lines.txt

Each step reads one kind: masked codes of images, masked words of texts, and of pairs
contrast, and both masked, with matching. The codes are those of DALL-E's dVAE, made on
the device. Paper: PMD (70 M pairs), ImageNet, CCNews and BookCorpus, batches of 8,192;
Flickr30k zero-shot text R@1 67.7, image 65.2, ImageNet's linear probe 75.5. `:tiny`:
seconds on a CPU, with a codebook of 32 codes that is drawn and not learned.

Departures: the text tower starts fresh, the paper's from its own masked words. Adam's
moments of what a step's kind does not reach decay; torch leaves them as they are.
"""

from configs import parts


def get_config(arg=""):
  tiny = arg == "tiny"
  name, patch, res = ("tiny", 8, 32) if tiny else ("B", 16, 224)
  batch, steps, warmup = (16, 6, 1) if tiny else (8192, 450_000, 10_000)
  c = parts.base(seed=0, batch_size=batch, total=steps)
  length = 16 if tiny else 77
  c.tokenizer = dict(type="wordpiece", path="bert-base-uncased", length=length)
  both = dict(norm_eps=1e-12, keep_raw=True)
  image = dict(type="vit", patch=patch, res=res, mask_token=True)
  codebook, hidden = parts.dvae(res, patch, tiny=tiny)
  c.model = dict(
    image=parts.size(name, **image, **both),
    text=parts.size(name, type="text", length=512, norm="pre", norm_pre=True, **both),
    fusion=dict(type="bridged", depth=2 if tiny else 6),
    codebook=codebook,
    embed_dim=32 if tiny else 768,
    scale="log_scale",
  )
  c.objectives = dict(
    itc=dict(targets="pair"),
    mmm=dict(rate_image=75 / 196, **hidden),
    mim=dict(kind="images", rate=75 / 196, **hidden),
    text_mlm=dict(kind="texts", tied=False),
  )
  parts.three_kinds(c, res, 0.9, tiny=tiny, drawn=True)
  c.optim = parts.frozen(lr=1e-3, warmup=warmup, weight_decay=0.1)
  dino = dict(type="hf_vit", path="facebook/dino-vitb16", fresh=("model/image/mask",))
  c.init = dict(codebook=parts.DVAE, image=dino)
  return parts.on_scenes(c, res) if tiny else c
