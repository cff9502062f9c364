"""BLIP fine-tuned for retrieval (Li et al. 2022, section 5.1), as its official code.

  python -m vlp_jax.train --config=configs/finetune/blip_retrieval.py \
    --workdir=runs/blip_coco --config.init.path=model_base_14M.pth

Paper: 8 A100. Expected (14 M, ViT-B, table 5): COCO TR@1 80.6 IR@1 63.1. "Zero-shot
Flickr30k" of the paper is the COCO model. Numbers: salesforce/BLIP configs/
retrieval_coco.yaml, train_retrieval.py and models/blip_retrieval.py.
"""

from configs import blip
from configs import parts


def get_config(arg=""):
  tiny = arg == "tiny"
  numbers = dict(res=384, epochs=6, lr=1e-5, length=35)
  c = blip.get_config("tiny" if tiny else "")
  c = parts.blip_task(c, "coco_karpathy", **numbers)
  c.data.source.type = "table"
  c.model.embed_dim = 256
  c.model.fusion.reads = ("bidirectional",)
  queue = dict(queue=64 if tiny else 57_600, distill=0.4, distill_ramp="1 epoch")
  c.objectives = dict(itc=dict(targets="image", **queue))
  c.objectives.itm = dict(
    negatives="hard", group=None, exclude="image", mined_by="live"
  )
  c.ema_decay = 0.995
  if not tiny:
    c.init.skip = (r"text_decoder\..*",)
    pp = "decode|resize(384)|clean(30, paper='blip')"
    files = dict(val="coco_karpathy_val.json", test="coco_karpathy_test.json")
    c.evals = parts.tables("retrieval", pp=pp, **files)
    for each in c.evals.values():
      each.update(rerank=256, add_similarity="as_is")
  return parts.on_scenes(c, 48) if tiny else c
