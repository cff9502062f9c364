"""ALBEF fine-tuned for retrieval (Li et al. 2021, section 4), as its official code.

  python -m vlp_jax.train --config=configs/finetune/albef_retrieval.py:flickr \
    --workdir=runs/albef_flickr --config.init.path=ALBEF.pth

Paper: 8 A100. Expected (14 M, table 2): COCO TR@1 77.6 IR@1 60.7; Flickr30k TR@1 95.9
IR@1 85.6. "Zero-shot Flickr30k" of the paper is the COCO model. Numbers: configs/
Retrieval_coco.yaml, Retrieval_flickr.yaml and models/model_retrieval.py.
"""

from configs import parts
from configs.finetune import tasks


def get_config(arg=""):
  tiny, flickr = arg == "tiny", arg == "flickr"
  c = tasks.albef_task(
    "flickr30k" if flickr else "coco",
    tiny=tiny,
    batch=256,
    epochs=10 if flickr else 5,
    length=30,
    lr=1e-5,
  )
  c.data.source.type = "table"
  c.model.embed_dim = 256
  alpha = dict(distill=0.4, distill_ramp="1 epoch")
  c.objectives = dict(
    itc=dict(queue=64 if tiny else 65_536, targets="image", **alpha),
    itm=dict(negatives="hard", group=None if tiny else 32, exclude="image"),
  )
  path = f"data/{'flickr30k' if flickr else 'coco'}_test.jsonl"
  if not tiny:
    c.evals = dict(test=dict(type="retrieval", every="1 epoch"))
    c.evals.test.rerank = 128 if flickr else 256
    data = dict(source=dict(type="table", path=path), pp="decode|resize(384)|clean(30)")
    c.evals.test.data = data
  return parts.on_scenes(c, 48) if tiny else c
