"""FLIP (Li et al. 2023, arXiv:2212.00794): CLIP that drops half of the patches.

  python -m vlp_jax.train --config=configs/flip.py --workdir=runs/flip \
    --config.data.source.path=pairs.jsonl

ViT-B/16, or `:L16`, `:H14`: 12.8 G examples of LAION-400M on TPU v3-256 (H: v3-512);
zero-shot ImageNet 68.0, 74.3, 75.5 after `:unmasked`, which is 100 "epochs" of 1.28 M
examples more of B/16 without dropping (start it with `--config.init`). Numbers:
facebookresearch/flip configs; lr is 4e-6 for 256 examples. `:tiny`: seconds on a CPU.
Departures: the text is pooled at its first token, kernels are drawn by their fan in.
"""

from configs import parts

# image, patch, text: width, depth; thousand epochs of ImageNet's 1,281,167 examples
SIZES = {
  "": ("B", 16, 512, 12, 10),
  "L16": ("L", 16, 768, 12, 10),
  "H14": ("H", 14, 1024, 24, 10),
  "unmasked": ("B", 16, 512, 12, 0.1),
  "tiny": ("tiny", 8, 32, 2, 0),
}


def get_config(arg=""):
  name, patch, width, depth, thousands = SIZES.get(arg, SIZES[""])
  tiny, tune = arg == "tiny", arg == "unmasked"
  res, batch = (32, 16) if tiny else (224, 65_536)
  warmup = 20 if tune else 200 if name == "H" else 40
  c = parts.base(seed=0, batch_size=batch)
  c.total = "8 steps" if tiny else f"{int(thousands * 1_281_167_000)} examples"
  c.tokenizer = dict(type="wordpiece", path="bert-base-uncased", length=32)
  vit = dict(type="vit", patch=patch, res=res, class_token=False, pool="mean")
  vit.update(posemb="sincos2d", drop_patches=0.0 if tune else 0.5, init_std=None)
  text = dict(type="text", width=width, depth=depth, num_heads=-(-width // 64))
  text.update(mlp_dim=4 * width, types=0, norm="pre", norm_eps=1e-6, init_std=None)
  c.model = dict(image=parts.size(name, **vit), text=text, embed_dim=width)
  c.model.update(scale="log_scale", temperature=0.07, project_bias=False)
  c.objectives = dict(itc=dict(targets="pair"))
  c.data = dict(source=dict(type="table", path="data/pairs.jsonl"))
  c.data.pp = f"decode|random_resized_crop({res}, min_area=0.5)|flip"
  c.optim = dict(lr=1.024e-5 if tune else 1.024e-3, b2=0.95, weight_decay=0.2)
  c.optim.warmup = "1 step" if tiny else f"{warmup * 1_281_167} examples"
  return parts.on_scenes(c, res) if tiny else c
