"""ViLT fine-tuned for retrieval (Kim et al. 2021, section 4), as its official code.

  python -m vlp_jax.train --config=configs/finetune/vilt_retrieval.py:flickr \
    --workdir=runs/vilt_flickr --config.init.path=vilt_200k_mlm_itm.ckpt

Expected: COCO TR@1 61.62 IR@1 42.99; Flickr30k TR@1 83.60 IR@1 64.54. Every image is
fused with every text: 35 hours of 8 GPUs for COCO, 1.5 for Flickr30k. Numbers:
dandelin/ViLT vilt/config.py task_finetune_irtr_coco_randaug and EVAL.md.
"""

from configs import parts
from configs import scratch
from configs import vilt
from configs.finetune import tasks


def get_config(arg=""):
  tiny = arg == "tiny"
  data = "f30k" if arg == "flickr" else "coco"
  c = vilt.get_config("tiny" if tiny else "")
  c = tasks.task_of(c, data, tiny=tiny, batch=256, epochs=10)
  c.data.source.type = "table"
  c.objectives = dict(text_rank=dict(negatives=3 if tiny else 15, exclude="pair"))
  if not tiny:
    # All patches of the largest image: 12 by 19.
    c.model.image.max_patches = 228
    c.data.pp = "decode|randaugment(2, 9)|fit(384, 639, 32)"
    c.init = dict(type="vilt", path="vilt_200k_mlm_itm.ckpt", key="state_dict")
    c.init.skip = (r"(mlm|itm)_score\..*",)
    pp = "decode|fit(384, 639, 32)"
    c.evals = tasks.tables("retrieval", pp=pp, test=f"{data}_test.json")
    c.evals.test.update(every="100%", all_pairs=True, objective="text_rank")
    return c
  return parts.on_scenes(scratch.from_nothing(c, batch=32), 48)
