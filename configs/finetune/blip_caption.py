"""BLIP fine-tuned to caption COCO (Li et al. 2022, section 5.2).

  python -m vlp_jax.train --config=configs/finetune/blip_caption.py \
    --workdir=runs/blip_caption --config.init.path=model_base_14M.pth

Paper: 8 A100, Karpathy's splits. Expected (14 M, ViT-B, table 7): B@4 38.6, CIDEr
129.7 on test, by beam search of 3. Numbers: salesforce/BLIP configs/caption_coco.yaml,
train_caption.py and models/blip.py. Every text begins with "a picture of".
"""

from configs import blip
from configs import parts
from configs.finetune import tasks


def get_config(arg=""):
  tiny = arg == "tiny"
  numbers = dict(res=384, epochs=5, lr=1e-5, length=40)
  c = blip.get_config("tiny" if tiny else "")
  c = tasks.blip_task(c, "coco_karpathy", **numbers)
  prompt = "a picture of "
  c.data.source.type = "table"
  c.data.pp += f"|prompt({prompt!r})"
  c.model.fusion.reads = ("causal",)
  c.objectives = dict(lm=dict(smoothing=0.1, prompt=4))
  if not tiny:
    heads = (r"(vision|text)_proj\..*", r"itm_head\..*", "temp")
    c.init.skip = (r"text_encoder\..*", *heads)
    files = dict(val="coco_karpathy_val.json", test="coco_karpathy_test.json")
    c.evals = tasks.tables("caption", pp="decode|resize(384)", **files)
    for each in c.evals.values():
      each.update(prompt=prompt, beams=3, max_length=20, min_length=5)
  return parts.on_scenes(c, 48) if tiny else c
