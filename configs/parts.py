"""Pieces that configs are put together from: sizes, pipelines, evaluations."""

import ml_collections

# name: width, depth, heads, mlp; Dosovitskiy et al. 2021, table 1, and Touvron et al.
# 2021, table 1 (Ti, S); "tiny" and "mini" are ours, for tests and for one CPU.
SIZES = {
  "tiny": (32, 2, 2, 64),
  "mini": (128, 3, 4, 512),
  "nano": (192, 5, 6, 768),
  "Ti": (192, 12, 3, 768),
  "S": (384, 12, 6, 1536),
  "B": (768, 12, 12, 3072),
  "L": (1024, 24, 16, 4096),
  "H": (1280, 32, 16, 5120),
  # Of Alabdulmohsin et al. 2023 (arXiv:2305.13035), as SigLIP has it.
  "So400m": (1152, 27, 16, 4304),
  # Of SigLIP 2 (giant-opt).
  "g-opt": (1536, 40, 16, 6144),
  # Of BEiT-3 (giant).
  "g-40": (1408, 40, 16, 6144),
}

# DALL-E's dVAE as transformers has it.
DVAE = dict(type="hf_codebook", path="facebook/flava-image-codebook")
# BEiT v2's tokenizer, of three the one that beit2/PRETRAINING.md recommends.
VQKD = dict(type="vqkd", path="vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth")
HALF = dict(image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))

# What ALBEF's official pretraining starts from: models/model_pretrain.py init_deit, and
# Pretrain.py --text_encoder. The file is timm's, the name is of Hugging Face's hub.
DEIT_AND_BERT = dict(
  image=dict(type="timm_vit", path="deit_base_patch16_224-b5f2ef4d.pth", key="model"),
  text=dict(
    type="hf_bert",
    path="bert-base-uncased",
    into=dict(text="model/text", fusion="model/fusion", mlm="objectives_mlm"),
  ),
)

# The image tower that METER starts from: OpenAI's file, whose last layer is left out.
CLIP_IMAGE = dict(
  type="clip",
  path="ViT-B-16.pt",
  into="model/image",
  skip=(r"visual\.transformer\.resblocks\.11\..*",),
)


def base(**fields):
  """A config with the given fields and nothing else: defaults live in the code."""
  return ml_collections.ConfigDict(fields)


def size(name, **fields):
  """Width, depth, heads and MLP of a named size; `fields` are added or win."""
  if name not in SIZES:
    raise ValueError(f"no size {name!r}; there are {', '.join(SIZES)}")
  width, depth, heads, mlp = SIZES[name]
  return dict(width=width, depth=depth, num_heads=heads, mlp_dim=mlp) | fields


def on_scenes(config, res, task="pairs", **fields):
  """The config with scenes as its data, a vocabulary of theirs, and a fresh start.

  fields: of data/sources/scenes.py.
  """
  if "init" in config:
    del config.init
  length = config.tokenizer.length
  recipe = dict(vocab_size=256, model_type="bpe")
  config.tokenizer = dict(type="sentencepiece", length=length, train=recipe)
  config.data.source = dict(type="scenes", size=300, res=res, task=task, **fields)
  return config


def three_kinds(config, res, min_area, *, tiny, **data):
  """Pairs, images alone and texts alone as the data; `data` adds to its fields."""
  pp = f"decode|random_resized_crop({res}, min_area={min_area})|flip"
  pairs = dict(type="table", path="data/pairs.jsonl")
  images = dict(type="images", path="data/images")
  texts = dict(type="lines", path="data/texts.txt")
  config.data = dict(source=pairs, pp=pp, **data)
  config.data.kinds = dict(
    images=dict(holds="images", pp=pp, source={} if tiny else images),
    texts=dict(holds="texts", pp="", source={} if tiny else texts),
  )


def dvae(res, patch, *, tiny):
  """(model.codebook, fields of an objective): DALL-E's codes of patches, in blocks."""
  small = dict(hidden=8, blocks=1) if tiny else {}
  return _codes(res // patch, dict(small, type="dvae"), 8, tiny)


def vqkd(res, patch, *, tiny):
  """(model.codebook, fields of an objective): BEiT v2's codes of patches, in blocks."""
  small = size("tiny", patch=8, code_width=8) if tiny else {}
  return _codes(res // patch, dict(small, type="vqkd"), 8 if tiny else 16, tiny)


def _codes(side, codebook, pixels, tiny):
  """pixels: along what has a code, in the codebook's own image."""
  codes = 32 if tiny else 8192
  hidden = dict(targets="codebook", codes=codes, patches=side**2)
  hidden["blocks"] = 4 if tiny else 16
  return dict(codebook, res=pixels * side, codes=codes), hidden


def vlmo_stage(config, stage):
  """What a stage of VLMo reads, starts from and leaves as it is (section 3.3)."""
  start = dict(type="native", path="runs/vlmo_images/native")
  if stage == "images":
    config.data.update(holds="images", source=dict(type="images", path="data/images"))
    config.optim = frozen(**config.optim)
  elif stage == "texts":
    texts = dict(type="lines", path="data/texts.txt")
    config.data = dict(holds="texts", source=texts, pp="")
    fusion = "^model/fusion/(lower|upper)/blocks/"
    # run.py trains words, types, distances, the texts' expert and the last norm alone.
    attention = "attn/(query|key|value|out)|norm_attn|scale_attn"
    frozen_parts = f"{fusion}({attention}|scale_mlp|(norm_)?mlp_image)(/|$)"
    config.optim.multipliers = ((frozen_parts, 0.0),)
    skip = ("model/(image|codebook)/.*", "objectives_mim/.*")
    fresh = ("model/text/.*", "model/fusion/pool/.*", "objectives_mlm/.*")
    config.init = dict(start, skip=skip, fresh=fresh)
  else:
    other = ("(?!model/image/).*",)
    fresh = ("model/image/.*", "model/.*_proj/.*", "model/log_scale", "objectives_it.*")
    config.init = dict(
      image=dict(start, skip=other, fresh=other),
      rest=dict(type="native", path="runs/vlmo_texts/native", fresh=fresh),
    )


def frozen(*others, **optim):
  """Fields of config.optim that leave the codebook, and `others`, as they are."""
  patterns = (r"^model/codebook/", *others)
  return optim | dict(multipliers=tuple((pattern, 0.0) for pattern in patterns))


def clip(image, *, patch, res, text, embed_dim, act="gelu"):
  """The model of CLIP: openai/CLIP clip/model.py.

  Departure: kernels are drawn by their fan in; the official ones are a little smaller
  where they end a branch of the text tower.

  Args:
    image: name of a size, or blocks of the four stages of a residual network.
    patch, res: in pixels; of a residual network its first stage's channels, and pixels.
    text: (width, depth); heads are of 64.
    embed_dim: of the shared space.
    act: "quick_gelu" is OpenAI's, "gelu" open_clip's where it does not say so.
  """
  both = dict(act=act, norm_eps=1e-5, init_std=None)
  width, depth = text
  if isinstance(image, str):
    vit = dict(type="vit", patch=patch, res=res, norm_pre=True, patch_bias=False)
    tower, more = size(image, **vit, **both), {}
  else:
    tower = dict(type="resnet", width=embed_dim, blocks=image, channels=patch, res=res)
    more = dict(project=("text",))  # what pools the image projects it as well
  words = dict(width=width, depth=depth, num_heads=-(-width // 64), mlp_dim=4 * width)
  words |= dict(type="text", types=0, norm="pre", attention="causal", pool="last")
  return dict(
    image=tower,
    text=words | both,
    embed_dim=embed_dim,
    scale="log_scale",
    temperature=0.07,
    project_bias=False,
    **more,
  )


def distil_late(config, weight, *, tiny):
  """Adds SigLIP 2's self-distillation and masked prediction, from 80 % of a run on."""
  config.ema_decay, config.model.image.mask_token = 0.966, True
  head = dict(prototypes=64, hidden=32, bottleneck=16) if tiny else {}
  views = dict(views=2 if tiny else 8, res=16 if tiny else 96, weight=weight)
  config.objectives.self_distill = dict(start="80%", **views, **head)
  config.objectives.masked_patches = dict(start="80%", weight=0.25 * weight, **head)


def clip_optim(**fields):
  """AdamW of CLIP, table 18 of the paper and open_clip's main.py: what is decayed."""
  # 1-D parameters are not; tables of positions and words are.
  spared = r"(^|/)(bias|scale|cls|log_scale)$"
  # At most ln 100.
  bounds = ((r"^model/log_scale$", (0.0, 4.605170185988092)),)
  fixed = dict(weight_decay=0.2, b2=0.98, eps=1e-6, undecayed=spared, bounds=bounds)
  return fixed | fields
