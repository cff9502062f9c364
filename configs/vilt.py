"""ViLT (Kim et al. 2021, arXiv:2102.03334), as its official code runs it.

  python -m vlp_jax.train --config=configs/vilt.py --workdir=runs/vilt \
    --config.data.source.path=pairs.jsonl

Paper: 200,000 steps (or `:100k`) of 4,096 pairs of GCC, SBU, COCO and VG on 64 V100,
about three days; VQA test-dev 71.32, zero-shot retrieval R@1 of Flickr30k 73.2 text,
55.0 image. Numbers: dandelin/ViLT vilt/config.py task_mlm_itm, TRAIN.md. It starts from
ViT-B/32 of ImageNet (AugReg, 384 pixels). `:tiny` is the method in seconds on a CPU.

Departures: negative images come from the batch, the official ones from all data; the
MLP drops out once, where timm drops after its activation too. The paper says a warm-up
of 10 %, the code 2,500 steps.
"""

from configs import parts


def get_config(arg=""):
  tiny = arg == "tiny"
  name, patch, batch = ("tiny", 16, 16) if tiny else ("B", 32, 4096)
  shorter, longer = (48, 80) if tiny else (384, 639)
  steps = "4 steps" if tiny else "100000 steps" if arg == "100k" else "200000 steps"
  c = parts.base(seed=0, batch_size=batch, total=steps)
  stack = parts.size(name, dropout=0.1)
  depth = stack.pop("depth")
  patches = dict(type="patches", width=stack["width"], patch=patch, dropout=0.1)
  patches |= dict(res=longer // patch * patch, table_res=shorter)
  c.model = dict(
    image=dict(patches, max_patches=12 if tiny else 200),
    text=dict(stack, type="text", depth=0),
    fusion=dict(type="merged", depth=depth, dropout=0.1),
    embed_dim=None,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
  )
  c.objectives = dict(
    itm=dict(negatives="random", exclude="pair", layout="half", align=0.1),
    mlm=dict(rate=0.15, whole_word=True, tied=False),
  )
  c.tokenizer = dict(type="wordpiece", path="bert-base-uncased", length=40)
  c.data = dict(source=dict(type="table", path="data/pairs.jsonl"))
  c.data.pp = f"decode|fit({shorter}, {longer}, {patch})"
  c.optim = dict(lr=1e-4, b2=0.98, weight_decay=0.01, schedule="linear")
  c.optim.undecayed = r"(^|/)(bias|scale)$"
  c.optim.warmup = "1 step" if tiny else "2500 steps"
  return parts.on_scenes(c, 48) if tiny else c
