"""ALBEF (Li et al. 2021, arXiv:2107.07651), as its official code runs it.

  python -m vlp_jax.train --config=configs/albef.py --workdir=runs/albef \
    --config.data.source.path=pairs.jsonl

It starts from DeiT-B (a file, see configs/parts.py) and BERT-base; from nothing with
--config.init=None.
Paper: 30 epochs of 4 M or 14 M pairs on 8 A100. Numbers: salesforce/ALBEF
configs/Pretrain.yaml and Pretrain.py. `:tiny` is the same method in seconds on a CPU.
"""

from configs import parts


def get_config(arg=""):
  tiny = arg == "tiny"
  name, res, length, batch = ("tiny", 32, 16, 16) if tiny else ("B", 256, 25, 512)
  bert = dict(depth=2 if tiny else 6, dropout=0.1, dropout_attention=0.1)
  c = parts.base(seed=0, batch_size=batch, total="4 steps" if tiny else "30 epochs")
  c.tokenizer = dict(
    type="wordpiece", path="bert-base-uncased", length=length, sep=False
  )
  c.model = dict(
    image=parts.size(name, type="vit", patch=16, res=res),
    text=parts.size(name, type="text", length=512, **bert),
    fusion=dict(type="cross_attention", **bert),
    embed_dim=256,
    temperature=0.07,
  )
  # The official loss counts only a row's own pair as right, and mines within the 64
  # pairs of one GPU.
  alpha = dict(distill=0.4, distill_ramp="1 epoch")
  c.objectives = dict(
    itc=dict(queue=64 if tiny else 65_536, targets="pair", **alpha),
    itm=dict(negatives="hard", group=None if tiny else 64, exclude="pair"),
    mlm=dict(rate=0.15, **alpha),
  )
  c.ema_decay = 0.995
  c.init = None if tiny else parts.DEIT_AND_BERT
  words = f"decode|random_resized_crop({res}, min_area=0.2)|flip|randaugment(2, 7)"
  c.data = dict(source=dict(type="table", path="data/pairs.jsonl"))
  c.data.pp = f"{words}|clean(30)"
  # The optimiser asks the wrapper, which exempts nothing: the official code decays the
  # class token, the position tables and the temperature too, all but 1-D parameters.
  c.optim = dict(lr=1e-4, weight_decay=0.02, undecayed=r"(^|/)(bias|scale)$")
  c.optim.update(warmup="1 step" if tiny else "2000 steps", warmup_lr=1e-5)
  c.optim.end_lr = 1e-5
  return parts.on_scenes(c, 48) if tiny else c
