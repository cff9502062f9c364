"""SigLIP 2 (Tschannen et al. 2025, arXiv:2502.14786): SigLIP that writes and distils.

  python -m vlp_jax.train --config=configs/siglip2.py --workdir=runs/siglip2 \
    --config.data.source.path=pairs.jsonl --config.tokenizer.path=FILE

FILE is Gemma's SentencePiece model of 256,000 pieces. B/16 at 256 pixels, or `:L16`,
`:So400m16`, `:g16`: 40 G examples of WebLI on up to 2,048 TPU v5e; zero-shot ImageNet
79.1, 82.5, -, 84.5, COCO image retrieval R@1 53.2, 54.7, -, 55.7. Sigmoid loss and
captions throughout; from 80 % on also self-distillation and masked prediction.
`:naflex` is the last tenth for images of their own aspect ratio, stretched 3.75 times
(B/16: 78.5, 51.1 at 256 patches): give it `--config.init`. `:tiny`: seconds on a CPU.
Decay is 1e-4, which big_vision does not multiply by the learning rate. Recalled, not
read again: the teacher's momentum. Departures are listed in cards/siglip2.toml.
"""

from configs import parts

# sizes of image and text, patch, res, weight of the late losses, of NaFlex
SIZES = {
  "": ("B", "B", 16, 256, 0.25, False),
  "L16": ("L", "L", 16, 256, 0.5, False),
  "So400m16": ("So400m", "So400m", 16, 256, 1.0, False),
  "g16": ("g-opt", "So400m", 16, 256, 0.5, False),
  "naflex": ("B", "B", 16, 256, 0.0, True),
  "tiny": ("tiny", "tiny", 8, 32, 0.25, False),
}


def get_config(arg=""):
  image, words, patch, res, late, naflex = SIZES.get(arg, SIZES[""])
  tiny, both = arg == "tiny", dict(act="gelu_tanh", norm_eps=1e-6, init_std=None)
  c = parts.base(seed=0, batch_size=16 if tiny else 32_768)
  c.total = "8 steps" if tiny else "15e9 examples" if naflex else "40e9 examples"
  c.tokenizer = dict(type="sentencepiece", path="data/gemma.model")
  c.tokenizer.length = 16 if tiny else 64
  vit = dict(type="naflex") if naflex else dict(type="vit", class_token=False)
  image = parts.size(image, patch=patch, res=res, pool="map", **vit, **both)
  text = parts.size(words, type="text", types=0, norm="pre", see_padding=True, **both)
  writer = text | dict(depth=text["depth"] // 2, see_padding=False)
  c.model = dict(image=image, text=text | dict(pool="last"), decoder=writer)
  c.model.update(embed_dim=image["width"], project=("text",), scale="log_scale")
  c.model.update(temperature=0.1, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
  lm = dict(writer="decoder", parallel=0.5, tied=False, transform=False)
  c.objectives = dict(itc=dict(loss="sigmoid", bias=-10.0, targets="pair"), lm=lm)
  if late:
    parts.distil_late(c, late, tiny=tiny)
  c.data = dict(source=dict(type="table", path="data/pairs.jsonl"))
  c.data.pp = f"decode|naflex({res}, {patch})" if naflex else f"decode|resize({res})"
  c.optim = dict(lr=2.45e-5 if naflex else 1e-3, b2=0.95, clip_norm=1.0, bounds=())
  c.optim.update(weight_decay=0.1, undecayed=r"(?<!/kernel)$")  # kernels alone
  c.optim.warmup = "1 step" if tiny else "0 steps" if naflex else "20000 steps"
  return parts.on_scenes(c, res) if tiny else c
