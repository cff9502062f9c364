"""CLIP or SigLIP of plain torch.nn, where open_clip is not installed."""

import torch
from torch import nn
from torch.nn import functional

from vlp_jax.bench.rivals import layers
from vlp_jax.bench.rivals import training


class Clip(nn.Module):
  """Two towers, two projections, and a contrastive loss."""

  def __init__(self, sizes):
    super().__init__()
    self.image = layers.Vit(sizes)
    self.text = layers.Words(sizes, post=False, causal=True)
    width, embed = sizes["image"]["width"], sizes["embed"]
    self.image_project = nn.Linear(width, embed, bias=False)
    self.text_project = nn.Linear(sizes["text"]["width"], embed, bias=False)
    self.scale = nn.Parameter(torch.tensor(2.6593))

  def forward(self, image, text):
    zimg = functional.normalize(self.image_project(self.image(image)[:, 0]), dim=-1)
    ztxt = functional.normalize(self.text_project(self.text(text)[:, -1]), dim=-1)
    return training.contrast(zimg, ztxt, self.scale.exp())


if __name__ == "__main__":
  training.main(Clip, training.pairs)
