"""ViLT fine-tuned for VQA v2, a choice of 3,129 answers (Kim et al. 2021, section 4).

  python -m vlp_jax.train --config=configs/finetune/vilt_vqa.py \
    --workdir=runs/vilt_vqa --config.init.path=vilt_200k_mlm_itm.ckpt

Paper: trained on VQA train and val but for 1,000 images. Expected: 71.32 test-dev.
Numbers: dandelin/ViLT vilt/config.py task_finetune_vqa_randaug and EVAL.md. A row of
the table has "answer_scores", {number of an answer: score}.
"""

from configs import parts
from configs import vilt
from configs.finetune import tasks


def get_config(arg=""):
  tiny = arg == "tiny"
  heads = (("^objectives", 10.0),)
  c = vilt.get_config("tiny" if tiny else "")
  c = tasks.task_of(c, "vqa", tiny=tiny, batch=256, epochs=10, multipliers=heads)
  c.objectives = dict(vqa_scores=dict(answers=3_129))
  if not tiny:
    # All patches of the largest image: 12 by 19.
    c.model.image.max_patches = 228
    c.data.source.path += ",data/vqa_trainable_val.json"
    c.data.pp = "decode|randaugment(2, 9)|fit(384, 639, 32)"
    c.init = dict(type="vilt", path="vilt_200k_mlm_itm.ckpt", key="state_dict")
    c.init.skip = (r"(mlm|itm)_score\..*",)
    c.init.fresh = ("objectives_vqa_scores/.*",)
    pp = "decode|fit(384, 639, 32)"
    c.evals = tasks.tables("vqa", pp=pp, val="vqa_rest_val.json", test="vqa_test.json")
    for each in c.evals.values():
      each.update(objective="vqa_scores", how="choose", answers="data/vqa_answers.json")
  return parts.on_scenes(c, 48, "vqa") if tiny else c
