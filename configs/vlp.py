"""VLP (Zhou et al. 2020, arXiv:1909.11059), on patches in the place of regions.

  python -m vlp_jax.train --config=configs/vlp.py --workdir=runs/vlp \
    --config.data.source.path=pairs.jsonl

Paper: 30 epochs of the 3 M pairs of Conceptual Captions, 100 regions each, in batches
of 512 on 8 V100, five hours an epoch; after fine-tuning CIDEr 116.9 on COCO (129.3 with
its reward), VQA test-dev 70.5. Numbers: LuoweiZhou/VLP README.md and
vlp/run_img2txt_dist.py. `:tiny` is the method in seconds on a CPU.

Departures: linear patches of 224 pixels where the paper has regions of a detector, so
its results are not to be expected (`models/regions.py` is equal to the official code,
but no data source gives regions yet); it starts afresh where the official run starts
from UniLM.
"""

from configs import parts


def get_config(arg=""):
  tiny = arg == "tiny"
  name, res, batch = ("tiny", 32, 16) if tiny else ("B", 224, 512)
  c = parts.base(seed=42, batch_size=batch, total="4 steps" if tiny else "30 epochs")
  stack = parts.size(name)
  depth = stack.pop("depth")
  drop = dict(dropout=0.1, dropout_attention=0.1)
  c.model = dict(
    image=dict(type="patches", width=stack["width"], patch=16, res=res, dropout=0.1),
    text=dict(stack, type="words", length=512, between=1 + (res // 16) ** 2),
    fusion=dict(type="stream", depth=depth, **drop),
    embed_dim=None,
  )
  words = dict(rate=0.15, max_masked=3, causal=0.75, end=True, norm_eps=1e-5)
  c.objectives = dict(mlm=words)
  c.tokenizer = dict(type="wordpiece", path="bert-base-cased", lower=False, length=22)
  c.data = dict(source=dict(type="table", path="data/pairs.jsonl"))
  c.data.pp = f"decode|resize({res})"
  c.optim = dict(lr=1e-4, eps=1e-6, weight_decay=0.01, schedule="linear", clip_norm=1.0)
  c.optim.update(undecayed=r"(^|/)(bias|scale)$", warmup="1 step" if tiny else "10%")
  return parts.on_scenes(c, 48) if tiny else c
