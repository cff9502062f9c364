"""BLIP (Li et al. 2022, arXiv:2201.12086), as its official code pretrains it.

  python -m vlp_jax.train --config=configs/blip.py --workdir=runs/blip \
    --config.data.source.path=pairs.jsonl

Numbers: salesforce/BLIP configs/pretrain.yaml and pretrain.py; its batch of 75 a GPU
and queue of 57,600 = 24 x 2,400 are of 32 GPUs. Paper: 14 M or 129 M pairs, 20 epochs,
two 16-GPU nodes; fine-tuned on COCO (14 M, ViT-B): TR@1 80.6, IR@1 63.1, CIDEr 129.7.
Official runs start from DeiT (`:large`: AugReg) and BERT. `:tiny`: seconds on a CPU.
"""

from configs import parts


def get_config(arg=""):
  tiny, large = arg == "tiny", arg == "large"
  res, batch, bert = (32, 16, "tiny") if tiny else (224, 2_400, "B")
  drop = dict(dropout=0.1, dropout_attention=0.1)
  c = parts.base(seed=0, batch_size=batch, total="4 steps" if tiny else "20 epochs")
  c.tokenizer = dict(type="wordpiece", path="bert-base-uncased", length=30, roles=True)
  vit = dict(type="vit", patch=16, res=res, drop_path=0.1 if large else 0.0)
  c.model = dict(
    image=parts.size("L" if large else bert, **vit),
    text=parts.size(bert, type="text", depth=0, length=512, types=0, dropout=0.1),
    fusion=dict(type="interleaved", depth=2 if tiny else 12, **drop),
    embed_dim=256,
    temperature=0.07,
  )
  queue = dict(queue=64 if tiny else 57_600, distill=0.4, distill_ramp="2 epochs")
  group = None if tiny else 75
  c.objectives = dict(itc=dict(targets="pair", **queue), lm=dict(smoothing=0.1))
  c.objectives.itm = dict(negatives="hard", group=group, exclude="pair")
  c.ema_decay = 0.995
  crop = f"random_resized_crop({res}, min_area=0.2)|flip|randaugment(2, 5)"
  c.data = dict(source=dict(type="table", path="data/pairs.jsonl"))
  c.data.pp = f"decode|{crop}|clean(30, paper='blip')"
  c.optim = dict(lr=2e-4 if large else 3e-4, weight_decay=0.05, undecayed=None)
  c.optim.update(warmup="1 step" if tiny else "3000 steps", warmup_lr=1e-6)
  c.optim.update(schedule="step", decay=0.9, decay_every="1 epoch", end_lr=1e-6)
  return c if not tiny else parts.on_scenes(c, res)
