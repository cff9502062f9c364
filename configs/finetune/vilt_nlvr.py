"""ViLT fine-tuned for NLVR2, two images and a sentence (Kim et al. 2021, section 4).

  python -m vlp_jax.train --config=configs/finetune/vilt_nlvr.py \
    --workdir=runs/vilt_nlvr --config.init.path=vilt_200k_mlm_itm.ckpt

Expected: 75.65 dev, 76.52 test-P. Numbers: dandelin/ViLT vilt/config.py
task_finetune_nlvr2_randaug and EVAL.md.
"""

from configs import parts
from configs import scratch
from configs import vilt
from configs.finetune import tasks


def get_config(arg=""):
  tiny = arg == "tiny"
  c = vilt.get_config("tiny" if tiny else "")
  c = tasks.task_of(c, "nlvr", tiny=tiny, batch=128, epochs=10)
  c.data.source.classes = ("False", "True")
  c.model.fusion.types = 3
  c.objectives = dict(pair_classify=dict(classes=2))
  if not tiny:
    # All patches of the largest image: 12 by 19.
    c.model.image.max_patches = 228
    c.data.pp = "decode|randaugment(2, 9)|fit(384, 639, 32)"
    c.init = dict(type="vilt", path="vilt_200k_mlm_itm.ckpt", key="state_dict")
    c.init.skip = (r"(mlm|itm)_score\..*",)
    c.init.fresh = ("objectives_pair_classify/.*",)
    pp, files = "decode|fit(384, 639, 32)", dict(val="nlvr_dev.json")
    c.evals = tasks.tables("classify", pp=pp, test="nlvr_test.json", **files)
    for each in c.evals.values():
      each.objective = "pair_classify"
    return c
  return parts.on_scenes(scratch.from_nothing(c, batch=64), 48, "nlvr")
