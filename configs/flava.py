"""FLAVA (Singh et al. 2022, arXiv:2112.04482): images, texts and pairs in turns.

  python -m vlp_jax.train --config=configs/flava.py --workdir=runs/flava \
    --config.data.source.path=pairs.jsonl \
    --config.data.kinds.images.source.path=FOLDER \
    --config.data.kinds.texts.source.path=lines.txt

Each step reads one kind: masked codes of images, masked words of texts, and of pairs
contrast, and both masked, with matching. The codes are those of DALL-E's dVAE, made on
the device. Paper: PMD (70 M pairs), ImageNet, CCNews and BookCorpus, batches of 8,192;
Flickr30k zero-shot text R@1 67.7, image 65.2, ImageNet's linear probe 75.5. `:tiny`:
seconds on a CPU, with a codebook of 32 codes that is drawn and not learned. The card
tells departures.
"""

from configs import parts

CODES = ((r"^model/codebook/", 0.0),)


def get_config(arg=""):
  tiny = arg == "tiny"
  name, patch, res = ("tiny", 8, 32) if tiny else ("B", 16, 224)
  c = parts.base(seed=0, batch_size=16 if tiny else 8192)
  c.total = "6 steps" if tiny else "450000 steps"
  length = 16 if tiny else 77
  c.tokenizer = dict(type="wordpiece", path="bert-base-uncased", length=length)
  both = dict(norm_eps=1e-12, keep_raw=True)
  image = dict(type="vit", patch=patch, res=res, mask_token=True)
  codes, small = (32, dict(hidden=8, blocks=1)) if tiny else (8192, {})
  c.model = dict(
    image=parts.size(name, **image, **both),
    text=parts.size(name, type="text", length=512, norm="pre", norm_pre=True, **both),
    fusion=dict(type="bridged", depth=2 if tiny else 6),
    codebook=dict(type="dvae", res=res if tiny else 112, codes=codes, **small),
    embed_dim=32 if tiny else 768,
    scale="log_scale",
    temperature=0.07,
  )
  hidden = dict(targets="codebook", codes=codes, patches=(res // patch) ** 2)
  hidden["blocks"] = 4 if tiny else 16
  c.objectives = dict(
    itc=dict(targets="pair"),
    mmm=dict(rate_image=75 / 196, **hidden),
    mim=dict(kind="images", rate=75 / 196, **hidden),
    text_mlm=dict(kind="texts", tied=False),
  )
  pp = f"decode|random_resized_crop({res}, min_area=0.9)|flip"
  c.data = dict(source=dict(type="table", path="data/pairs.jsonl"), pp=pp, drawn=True)
  images = dict(type="images", path="data/imagenet/train")
  texts = dict(type="lines", path="data/texts.txt")
  c.data.kinds = dict(
    images=dict(holds="images", pp=pp, source={} if tiny else images),
    texts=dict(holds="texts", pp="", source={} if tiny else texts),
  )
  c.optim = dict(lr=1e-3, weight_decay=0.1, multipliers=CODES)
  c.optim.warmup = "1 step" if tiny else "10000 steps"
  if tiny:
    return parts.on_scenes(c, res)
  c.init = dict(
    codebook=dict(type="hf_codebook", path="facebook/flava-image-codebook"),
    image=dict(type="hf_vit", path="facebook/dino-vitb16", fresh=("model/image/mask",)),
  )
  return c
