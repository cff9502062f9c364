"""VLMo (Bao et al. 2021, arXiv:2111.02358): experts, pretrained in three stages.

  python -m vlp_jax.train --config=configs/vlmo.py:images --workdir=runs/vlmo_images
  python -m vlp_jax.train --config=configs/vlmo.py:texts --workdir=runs/vlmo_texts
  python -m vlp_jax.train --config=configs/vlmo.py --workdir=runs/vlmo

`:images` learns attention and the vision expert from masked codes (as BEiT), `:texts`
the language expert alone, and the last stage all of it on pairs: contrast, matching and
masked words. Between them, `vlp-jax convert --weights=runs/vlmo_images
--out=runs/vlmo_images/native` makes what the next ones start from. Base, 200,000 steps
of 1,024 pairs of GCC, SBU, COCO and VG (4 M images) on V100; VQA test-dev 76.6, NLVR2
test-P 83.3, COCO fine-tuned text R@1 74.8, image 57.2. Numbers: microsoft/unilm vlmo
config.py. `:tiny` is the last stage, fresh, in seconds on a CPU.

Positions are biases of attention by distance. Departure: contrast reads the experts of
the modality alone, the official code also those of pairs, and averages both losses.
"""

from configs import parts


def get_config(arg=""):
  tiny, alone = arg == "tiny", arg if arg in ("images", "texts") else ""
  name, patch, res = ("tiny", 8, 32) if tiny else ("B", 16, 224)
  batch, steps, warmup = (16, 4, 1) if tiny else (1024, 200_000, 2500)
  length = 16 if tiny else 196 if arg == "texts" else 40
  c = parts.base(seed=1, batch_size=batch, total=steps)
  c.tokenizer = dict(type="wordpiece", path="bert-base-uncased", length=length)
  stack = parts.size(name)
  depths = dict(depth=stack.pop("depth"), pair_depth=1 if tiny else 2)
  own = dict(separate=False, subln=False, layer_scale=0.1, types=2, pool="tanh")
  own["distances"] = (res // patch, 196)
  placeless = dict(stack, depth=0, posemb="none")
  c.model = dict(
    image=dict(placeless, type="vit", patch=patch, res=res, mask_token=True),
    text=dict(placeless, type="text", dropout=0.1),
    fusion=dict(type="experts", norm_eps=1e-6, drop_path=0.1, **depths, **own),
    embed_dim=None if alone else stack["width"],
    scale="log_scale",
    project_bias=False,
    **parts.HALF,
  )
  pp = f"decode|random_resized_crop({res}, min_area=0.5)|flip|randaugment(2, 7)"
  words = dict(whole_word=True, tied=False)
  c.data = dict(source=dict(type="table", path="data/pairs.jsonl"), pp=pp)
  c.objectives = dict(itc=dict(targets="pair"), itm={}, mlm=dict(words, weight=0.25))
  if arg == "images":
    c.model.codebook, hidden = parts.dvae(res, patch, tiny=False)
    c.objectives, c.init = dict(mim=hidden), dict(codebook=parts.DVAE)
  if arg == "texts":
    c.objectives = dict(mlm=dict(words, type="text_mlm"))
  c.optim = dict(lr=2e-4, warmup=warmup, weight_decay=0.01, schedule="linear", b2=0.98)
  parts.vlmo_stage(c, arg)
  return parts.on_scenes(c, res) if tiny else c
