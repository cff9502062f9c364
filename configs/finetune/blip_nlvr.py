"""BLIP fine-tuned for NLVR2, two images and a sentence (Li et al. 2022, section 5.4).

  python -m vlp_jax.train --config=configs/finetune/blip_nlvr.py \
    --workdir=runs/blip_nlvr --config.init.path=model_base_14M.pth

Paper: 16 A100. Expected (14 M, ViT-B, table 8): 82.67 dev, 82.30 test-P. Numbers:
salesforce/BLIP configs/nlvr.yaml, train_nlvr.py and models/blip_nlvr.py. The official
text is not cut; here it is at 64 pieces.
"""

from configs import blip
from configs import parts
from configs import scratch
from configs.finetune import tasks


def get_config(arg=""):
  tiny = arg == "tiny"
  numbers = dict(res=384, epochs=15, lr=3e-5, length=64, words=40)
  c = blip.get_config("tiny" if tiny else "")
  c = tasks.blip_task(c, "nlvr", **numbers)
  c.data.source.classes = ("False", "True")
  c.model.image.drop_path = 0.1
  c.model.fusion.type = "twin"
  c.model.fusion.merge_from = 1 if tiny else 6
  c.objectives = dict(classify=dict(classes=2, images=2))
  if not tiny:  # Of scenes, left and right are places within a picture too.
    c.data.pp += "|swap_sides"
    heads = (r"(vision|text)_proj\..*", r"itm_head\..*", "temp")
    c.init.skip = (r"text_decoder\..*", *heads)
    c.init.fresh = ("objectives_classify/.*", ".*/merge/.*")
    pp = "decode|resize(384)|clean(40, paper='blip')"
    files = dict(val="nlvr_dev.json", test="nlvr_test.json")
    c.evals = tasks.tables("classify", pp=pp, **files)
    return c
  # Of 32 pixels, the augmentation leaves too little to say what is shown.
  c.data.pp = "decode|resize(32)|clean(40, paper='blip')"
  return parts.on_scenes(scratch.from_nothing(c, batch=64), 48, "nlvr")
