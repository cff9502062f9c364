"""METER (Dou et al. 2022, arXiv:2111.02387), as its official code runs it.

  python -m vlp_jax.train --config=configs/meter.py --workdir=runs/meter \
    --config.data.source.path=pairs.jsonl

Paper: CLIP-ViT-B/16 at 288 pixels and RoBERTa-base, 100,000 steps of 4,096 pairs of
GCC, SBU, COCO and VG on 8 A100, eight days; VQA test-dev 77.68, zero-shot retrieval
R@1 of Flickr30k 90.9 text, 79.6 image. Numbers: zdou0830/METER meter/config.py
task_mlm_itm_clip_bert, and README.md (clip16 text_roberta image_size=288). `:bert` has
BERT for RoBERTa, and masks whole words; `:tiny` is the method in seconds on a CPU.
It starts from OpenAI's ViT-B-16.pt and RoBERTa: --config.init.image.path says where.

Departures: negative images come from the batch, the official ones from all data.
"""

from configs import parts


def get_config(arg=""):
  tiny, bert = arg == "tiny", arg == "bert"
  name, res, batch = ("tiny", 32, 16) if tiny else ("B", 288, 4096)
  c = parts.base(seed=0, batch_size=batch, total="4 steps" if tiny else "100000 steps")
  drop = dict(dropout=0.1, dropout_attention=0.1)
  # CLIP's last layer is left out: 11 of 12.
  clip = dict(norm_pre=True, patch_bias=False, act="quick_gelu", norm_eps=1e-5)
  image = parts.size(name, type="vit", patch=16, res=res, **clip)
  words = dict(length=514, types=1, norm_eps=1e-5, first_position=2)
  words = dict(length=512) if bert else words
  c.model = dict(
    image=image | dict(depth=image["depth"] - 1),
    text=parts.size(name, type="text", **drop, **words),
    fusion=dict(type="co_attention", depth=2 if tiny else 6, **drop),
    embed_dim=None,
  )
  c.objectives = dict(
    itm=dict(negatives="random", exclude="pair", layout="half"),
    mlm=dict(rate=0.15, whole_word=bert, tied=False),
  )
  kind = "wordpiece" if bert else "byte_level"
  path = "bert-base-uncased" if bert else "roberta-base"
  c.tokenizer = dict(type=kind, path=path, length=50)
  towers = dict(image=parts.CLIP_IMAGE, text=dict(type="hf_bert", path=path))
  c.init = None if tiny else towers
  c.data = dict(source=dict(type="table", path="data/pairs.jsonl"))
  c.data.pp = f"decode|resize_shorter({res})|center_crop({res})"
  c.optim = dict(lr=1e-5, b2=0.98, weight_decay=0.01, schedule="linear")
  # By names, the official code spares torch's norms, but not those of CLIP.
  c.optim.undecayed = r"(^|/)bias$|^(?!model/image/).*/scale$"
  types, heads = ("^model/fusion/type", 1.0), ("^model/fusion|^objectives", 5.0)
  c.optim.multipliers = (types, heads)
  c.optim.warmup = "1 step" if tiny else "10%"
  return parts.on_scenes(c, 48) if tiny else c
