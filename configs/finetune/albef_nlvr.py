"""ALBEF fine-tuned for NLVR2, two images and a sentence (Li et al. 2021, section 4).

  python -m vlp_jax.train --config=configs/finetune/albef_nlvr.py \
    --workdir=runs/albef_nlvr --config.init.path=pretrain_model_nlvr.pth

It starts from the official file after text-assignment pretraining, whose stack is as
deep as this one's. Paper: 8 A100. Expected (14 M, table 3): 82.55 dev, 83.14 test-P.
Numbers: salesforce/ALBEF configs/NLVR.yaml, NLVR.py and models/model_nlvr.py. The
official text is not cut; here it is at 64 pieces.
"""

from configs import parts
from configs import scratch
from configs.finetune import tasks


def get_config(arg=""):
  tiny = arg == "tiny"
  c = tasks.albef_task("nlvr", tiny=tiny, batch=128, epochs=10, length=64)
  c.model.fusion.type = "paired"
  c.data.source.classes = ("False", "True")
  alpha = dict(distill=0.4, distill_ramp="1 epoch")
  c.objectives = dict(classify=dict(classes=2, images=2, **alpha))
  if not tiny:
    c.init = dict(type="albef_tasks", path="pretrain_model_nlvr.pth")
    c.init.skip = ("ta_head.*", "(vision|text)_proj.*", "temp")
    c.init.fresh = ("objectives_classify/.*",)
    c.evals = tasks.tables("classify", val="nlvr_dev.json", test="nlvr_test.json")
    return c
  # The augmentation moves by ten pixels and crops to a half: of 32 pixels too much to
  # say what is shown. A teacher that knows nothing is to be heard late.
  c.data.pp = "decode|resize(32)|clean(30)"
  c.objectives.classify.distill_ramp = "100%"
  return parts.on_scenes(scratch.from_nothing(c, batch=64), 48, "nlvr")
