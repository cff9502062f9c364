"""LiT (Zhai et al. 2022, arXiv:2111.07991): a text tower for a locked image tower.

  python -m vlp_jax.train --config=configs/lit.py --workdir=runs/lit \
    --config.data.source.path=pairs.jsonl

The image tower, AugReg's ViT-B/16, is not trained and has no projection; the text tower
starts from BERT-base; `:L16` has L/16 and BERT-large. --config.init.image.path says
where the file is. README_lit.md of big_vision: zero-shot ImageNet 73.9 (B16B_2, 60,000
steps) and 75.7 (L16L); COCO image retrieval R@1 31.8 and 31.2, text 51.5 and 48.5.
`--config.init="{'type': 'lit', 'path': 'LiT-B16B_2.npz'}"` reads the released file.
`:tiny`: seconds on a CPU, on an untrained image tower.
Batch and decay: appendices C and D of the paper. Other numbers: big_vision's
lit_coco.py, which it has no longer. Departure: AdamW where the paper has Adafactor with
momentum.
"""

from configs import parts


def get_config(arg=""):
  tiny, large = arg == "tiny", arg == "L16"
  name, res, batch = ("tiny", 32, 16) if tiny else ("L" if large else "B", 224, 16_384)
  c = parts.base(seed=0, batch_size=batch, total="8 steps" if tiny else "60000 steps")
  c.tokenizer = dict(type="wordpiece", path="bert-base-uncased", length=16)
  # big_vision configs/proj/image_text/common.py `inits`.
  bert, aug = ("large", "strong1") if large else ("base", "medium1")
  path = f"{name}_16-i21k-300ep-lr_0.001-aug_{aug}-wd_0.1-do_0.0-sd_0.0.npz"
  text = dict(type="hf_bert", path=f"bert-{bert}-uncased", act="gelu_tanh")
  c.init = None if tiny else dict(image=dict(type="augreg", path=path), text=text)
  image = parts.size(name, type="vit", patch=16, res=res, act="gelu_tanh")
  c.model = dict(
    image=image,
    text=parts.size(name, type="text", length=512, act="gelu_tanh"),
    embed_dim=image["width"],
    project=("text",),
    scale="log_scale",
    temperature=0.1,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
  )
  c.objectives = dict(itc=dict(targets="pair"))
  c.data = dict(source=dict(type="table", path="data/pairs.jsonl"))
  c.data.pp = f"decode|resize({res})"
  c.optim = dict(lr=1e-3, weight_decay=0.1, clip_norm=1.0, bounds=())
  # big_vision decays kernels alone, and does not multiply the decay (1e-4) by lr.
  c.optim.undecayed = r"(?<!/kernel)$"
  c.optim.multipliers = (("^model/image/", 0.0),)
  c.optim.warmup = "1 step" if tiny else "3%"
  return parts.on_scenes(c, res) if tiny else c
