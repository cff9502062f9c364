"""METER fine-tuned for VQA v2, a choice of 3,129 answers (Dou et al. 2022, section 4).

  python -m vlp_jax.train --config=configs/finetune/meter_vqa.py \
    --workdir=runs/meter_vqa --config.init.path=meter_clip16_288_roberta_pretrain.ckpt

Paper: 8 A100, at 576 pixels. Expected (table 8): 77.68 test-dev, 77.64 test-std.
Numbers: zdou0830/METER meter/config.py task_finetune_vqa_clip_bert, and README.md
(clip16 text_roberta image_size=576 clip_randaug). A row of the table has
"answer_scores", {number of an answer: score}.
"""

from configs import meter
from configs import parts
from configs.finetune import tasks


def get_config(arg=""):
  tiny = arg == "tiny"
  numbers = dict(batch=512, epochs=10, lr=5e-6)
  factors = (("^model/fusion/type", 1.0), ("^model/fusion", 5.0), ("^objectives", 50.0))
  c = meter.get_config("tiny" if tiny else "")
  c = tasks.task_of(c, "vqa", tiny=tiny, multipliers=factors, **numbers)
  c.objectives = dict(vqa_scores=dict(answers=3_129))
  if not tiny:
    c.model.image.res = 576
    c.data.source.path += ",data/vqa_trainable_val.json"
    pp = "resize_shorter(576)|center_crop(576)"
    c.data.pp = f"decode|randaugment(2, 9)|{pp}"
    path = "meter_clip16_288_roberta_pretrain.ckpt"
    c.init = dict(type="meter", path=path, key="state_dict")
    c.init.skip = (r"(mlm|itm)_score\..*",)
    c.init.fresh = ("objectives_vqa_scores/.*",)
    files = dict(val="vqa_rest_val.json", test="vqa_test.json")
    c.evals = tasks.tables("vqa", pp=f"decode|{pp}", **files)
    for each in c.evals.values():
      each.update(objective="vqa_scores", how="choose", answers="data/vqa_answers.json")
  return parts.on_scenes(c, 48, "vqa") if tiny else c
