"""METER fine-tuned for NLVR2, two images and a sentence (Dou et al. 2022, section 4).

  python -m vlp_jax.train --config=configs/finetune/meter_nlvr.py \
    --workdir=runs/meter_nlvr --config.init.path=meter_clip16_288_roberta_pretrain.ckpt

Paper: 8 A100, at 288 pixels. Expected (table 8): 82.33 dev, 83.05 test-P. Numbers:
zdou0830/METER meter/config.py task_finetune_nlvr2_clip_bert, and README.md (clip16
text_roberta image_size=288 clip_randaug).
"""

from configs import meter
from configs import parts
from configs import scratch
from configs.finetune import tasks


def get_config(arg=""):
  tiny = arg == "tiny"
  factors = (("^model/fusion/type", 1.0), ("^model/fusion", 5.0), ("^objectives", 10.0))
  numbers = dict(batch=256, epochs=10, lr=1e-5)
  c = meter.get_config("tiny" if tiny else "")
  c = tasks.task_of(c, "nlvr", tiny=tiny, multipliers=factors, **numbers)
  c.data.source.classes = ("False", "True")
  c.model.fusion.types = 3
  c.objectives = dict(pair_classify=dict(classes=2))
  if not tiny:
    pp = "resize_shorter(288)|center_crop(288)"
    c.data.pp = f"decode|randaugment(2, 9)|{pp}"
    path = "meter_clip16_288_roberta_pretrain.ckpt"
    c.init = dict(type="meter", path=path, key="state_dict")
    c.init.skip = (r"(mlm|itm)_score\..*",)
    c.init.fresh = ("objectives_pair_classify/.*",)
    files = dict(val="nlvr_dev.json", test="nlvr_test.json")
    c.evals = tasks.tables("classify", pp=f"decode|{pp}", **files)
    for each in c.evals.values():
      each.objective = "pair_classify"
    return c
  # Rates of their own are for what begins, on towers that have learned.
  c.optim.multipliers = ()
  return parts.on_scenes(scratch.from_nothing(c, batch=64), 48, "nlvr")
