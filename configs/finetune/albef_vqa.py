"""ALBEF fine-tuned for VQA v2, which writes the answer (Li et al. 2021, section 4).

  python -m vlp_jax.train --config=configs/finetune/albef_vqa.py \
    --workdir=runs/albef_vqa --config.init.path=ALBEF.pth

Paper: 8 A100; trained on VQA train and val and Visual Genome's questions. Expected
(14 M, table 3): 75.84 test-dev, 76.04 test-std, ranking 3,128 answers (the 128 that
are likeliest by their first token). Numbers: configs/VQA.yaml, VQA.py and models/
model_vqa.py of salesforce/ALBEF. Answers end in [SEP]; a question of VQA has at most
ten of them.
"""

from configs import parts
from configs.finetune import tasks


def get_config(arg=""):
  tiny = arg == "tiny"
  c = tasks.albef_task(
    "vqa", tiny=tiny, batch=256, epochs=8, length=25, warmup="400 steps"
  )
  # Of a question of Visual Genome there is one answer.
  c.data.source.path = "data/vqa_train.json,data/vqa_val.json,data/vg_qa.json"
  c.data.source.answer_weight = 0.5
  decoder = dict(length=512, dropout=0.1, dropout_attention=0.1)
  depth = 2 if tiny else 6
  c.model.decoder = parts.size("tiny" if tiny else "B", **decoder | dict(depth=depth))
  c.objectives = dict(vqa=dict(answers=10, distill=0.4, distill_ramp="1 epoch"))
  return parts.on_scenes(c, 48, "vqa") if tiny else c
