"""VLP (Zhou et al. 2020, arXiv:1909.11059), on regions, or on patches in their place.

  python -m vlp_jax.train --config=configs/vlp.py:regions --workdir=runs/vlp \
    --config.data.source.path=pairs.jsonl --config.data.source.root=FOLDER

With `:regions`, FOLDER has an .npz of each image (data/regions.py): boxes in pixels,
features and class probabilities of 100 regions. Without, images are read as patches,
and pairs.jsonl is all that is wanted. Paper: 30 epochs of the 3 M pairs of Conceptual
Captions, 100 regions each, in batches of 512 on 8 V100, five hours an epoch; after
fine-tuning CIDEr 116.9 on COCO (129.3 with its reward), VQA test-dev 70.5. Numbers:
LuoweiZhou/VLP README.md and vlp/run_img2txt_dist.py. `:tiny` and `:tiny_regions` are
the method in seconds on a CPU.

Departures: without `:regions`, linear patches of 224 pixels, by which the paper's
results are not to be expected; it starts afresh where the official run starts from
UniLM and, for regions, from the detector's last layer.
"""

from configs import parts


def get_config(arg=""):
  regions = arg == "regions" or arg == "tiny_regions"
  tiny = arg == "tiny" or arg == "tiny_regions"
  name, res, batch = ("tiny", 32, 16) if tiny else ("B", 224, 512)
  c = parts.base(seed=42, batch_size=batch, total="4 steps" if tiny else "30 epochs")
  stack = parts.size(name)
  depth = stack.pop("depth")
  drop = dict(dropout=0.1, dropout_attention=0.1)
  image, between = dict(type="patches", patch=16, res=res), 1 + (res // 16) ** 2
  c.data = dict(source=dict(type="table", path="data/pairs.jsonl"))
  c.data.pp = f"decode|resize({res})"
  if regions:
    image, between = dict(type="regions"), 8 if tiny else 100
    image |= dict(regions=8, features=64, places=55) if tiny else {}
    c.data.source.suffix = ".npz"
    sizes = "features=64, classes=49, fewest=8" if tiny else "fewest=100"
    c.data.pp = f"regions({between}, 'vlp', {sizes})"
  c.model = dict(
    image=dict(image, width=stack["width"], dropout=0.1),
    text=dict(stack, type="words", length=512, between=between),
    fusion=dict(type="stream", depth=depth, **drop),
    embed_dim=None,
  )
  words = dict(rate=0.15, max_masked=3, causal=0.75, end=True, norm_eps=1e-5)
  c.objectives = dict(mlm=words)
  c.tokenizer = dict(type="wordpiece", path="bert-base-cased", lower=False, length=22)
  c.optim = dict(lr=1e-4, eps=1e-6, weight_decay=0.01, schedule="linear", clip_norm=1.0)
  c.optim.update(undecayed=r"(^|/)(bias|scale)$", warmup="1 step" if tiny else "10%")
  return parts.on_scenes(c, 48, regions=8 if regions else 0) if tiny else c
