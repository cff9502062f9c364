"""BLIP fine-tuned for VQA v2, which writes the answer (Li et al. 2022, section 5.3).

  python -m vlp_jax.train --config=configs/finetune/blip_vqa.py \
    --workdir=runs/blip_vqa --config.init.path=model_base_14M.pth

Paper: 16 A100; trained on VQA train and val and Visual Genome's questions. Expected
(14 M, ViT-B, table 8): 77.54 test-dev, 77.62 test-std, ranking 3,128 answers (the 128
that are likeliest by their first token). Numbers: salesforce/BLIP configs/vqa.yaml,
train_vqa.py, data/vqa_dataset.py and models/blip_vqa.py.
"""

from configs import blip
from configs import parts
from configs.finetune import tasks


def get_config(arg=""):
  tiny = arg == "tiny"
  numbers = dict(res=480, epochs=10, lr=2e-5, length=35, words=50)
  c = blip.get_config("tiny" if tiny else "")
  c = tasks.blip_task(c, "vqa", **numbers)
  # Of a question of Visual Genome there is one answer.
  c.data.source.path = "data/vqa_train.json,data/vqa_val.json,data/vg_qa.json"
  c.data.source.answer_weight = 0.2
  c.model.image.drop_path = 0.1
  c.model.fusion.reads = ("bidirectional",)
  drop = dict(dropout=0.1, dropout_attention=0.1)
  c.model.decoder = parts.size("tiny" if tiny else "B", length=512, types=0, **drop)
  c.objectives = dict(vqa=dict(answers=10, smoothing=0.1, first_twice=False))
  if not tiny:
    c.init.skip = (r"(vision|text)_proj\..*", r"itm_head\..*", "temp")
    pp = "decode|resize(480)|clean(50, paper='blip')"
    c.evals = tasks.tables("vqa", pp=pp, test="vqa_test.json")
    c.evals.test.update(how="rank", rank=128, answers="data/answer_list.json")
  return parts.on_scenes(c, 48, "vqa") if tiny else c
