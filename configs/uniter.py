"""UNITER (Chen et al. 2020, arXiv:1909.11740), on regions of a detector.

  python -m vlp_jax.train --config=configs/uniter.py --workdir=runs/uniter \
    --config.data.source.path=pairs.jsonl --config.data.source.root=FOLDER

FOLDER has an .npz of each image (data/regions.py), up to 100 regions of 2,048 features
by bottom-up attention. Paper: 200,000 steps of COCO, VG, CC and SBU (9.6 M pairs) on 8
V100 with accumulation, or `:L`, 500,000 on 16; of ITM with word-region alignment, MLM
and masked regions (features, class distribution) each step has one. VQA test-dev 72.70,
73.82; zero-shot Flickr30k image R@1 66.16, 68.74. Numbers: ChenRocks/UNITER config/
pretrain-alldata-base-8gpu.json, -large-16gpu.json. It starts from BERT. `:tiny` is the
method in seconds on a CPU.

Departures: a batch has a fixed number of pairs, officially of tokens (10,240 a GPU);
negative images come from the batch, half of the pairs have one; BERT's types and
pooler are drawn afresh.
"""

from configs import parts


def get_config(arg=""):
  tiny, large = arg == "tiny", arg == "L"
  c = parts.base(seed=42, batch_size=16 if tiny else 7_680 if large else 9_600)
  c.total = "8 steps" if tiny else "500000 steps" if large else "200000 steps"
  stack = parts.size("tiny" if tiny else "L" if large else "B")
  depth = stack.pop("depth")
  regions = dict(regions=8, features=64, classes=49) if tiny else {}
  c.model = dict(
    image=dict(type="normed_regions", width=stack["width"], dropout=0.1, **regions),
    text=dict(stack, type="text", depth=0, length=512, types=1, dropout=0.1),
    fusion=dict(type="merged", depth=depth, types=0, norm="post", norm_eps=1e-12),
    embed_dim=None,
  )
  c.model.fusion.update(dropout=0.1, dropout_attention=0.1)
  if not tiny:
    fresh = ("model/text/type/embedding", "model/fusion/pool/.*")
    skip = (r"bert\.embeddings\.token_type_embeddings\.weight",)
    path = f"bert-{'large' if large else 'base'}-cased"
    c.init = dict(parts.DEIT_AND_BERT["text"], path=path, skip=skip, fresh=fresh)
  aligned = dict(align=0.1, align_special=True)
  c.objectives = dict(
    itm=dict(share=3.0, negatives="random", layout="half", **aligned),
    mlm=dict(share=4.0, rate=0.15),
    mrfr=dict(type="mrm", share=2.0, target="features", rate=0.15),
    mrc=dict(type="mrm", share=2.0, target="distribution", rate=0.15),
  )
  c.tokenizer = dict(type="wordpiece", path="bert-base-cased", lower=False, length=62)
  c.data = dict(source=dict(type="table", path="data/pairs.jsonl", suffix=".npz"))
  small = "regions(8, features=64, classes=49, fewest=8)"
  c.data.pp = small if tiny else "regions(100)"
  c.optim = dict(lr=5e-5, b2=0.98, eps=1e-6, weight_decay=0.01, clip_norm=5.0)
  c.optim.update(schedule="linear", undecayed=r"(^|/)(bias|scale)$")
  c.optim.warmup = "1 step" if tiny else "10000 steps"
  return parts.on_scenes(c, 48, regions=8) if tiny else c
