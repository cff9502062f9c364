"""ALBEF fine-tuned for visual entailment, SNLI-VE (Li et al. 2021, section 4).

  python -m vlp_jax.train --config=configs/finetune/albef_ve.py \
    --workdir=runs/albef_ve --config.init.path=ALBEF.pth

Paper: 8 A100. Expected (14 M, table 3): 80.80 val, 80.91 test. Numbers: VE.py,
configs/VE.yaml and models/model_ve.py of salesforce/ALBEF. Classes: 0 contradiction, 1
neutral, 2 entailment. The official text is not cut; here it is at 48 pieces.
"""

from configs import parts
from configs.finetune import tasks


def get_config(arg=""):
  tiny = arg == "tiny"
  c = tasks.albef_task("ve", tiny=tiny, batch=256, epochs=5, length=48)
  c.objectives = dict(classify=dict(classes=3, distill=0.4))
  c.data.source.suffix = ".jpg"
  c.data.source.classes = ("contradiction", "neutral", "entailment")
  if not tiny:
    c.evals = tasks.tables("classify", val="ve_dev.json", test="ve_test.json")
  return parts.on_scenes(c, 48, "ve") if tiny else c
