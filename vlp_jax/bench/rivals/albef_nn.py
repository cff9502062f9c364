"""ALBEF of plain torch.nn, without its teacher: contrast, matching, masked words.

As in its official code, matching goes through the fusion with the pairs and with both
kinds of negatives, and masked words are encoded and fused once more
(https://arxiv.org/abs/2107.07651, section 3.2).
"""

import torch
from torch import nn
from torch.nn import functional

from vlp_jax.bench.rivals import layers
from vlp_jax.bench.rivals import training


class Albef(nn.Module):
  """ViT, the lower half of BERT, and its upper half with attention to the image."""

  def __init__(self, sizes):
    super().__init__()
    width, embed = sizes["text"]["width"], sizes["embed"]
    image_width = sizes["image"]["width"]
    self.image = layers.Vit(sizes)
    self.text = layers.Words(sizes, post=True, causal=False)
    fusion = sizes["fusion"] | {"width": width}
    self.fusion = nn.ModuleList(
      layers.Block(fusion, memory_width=image_width, post=True)
      for _ in range(fusion["depth"])
    )
    self.image_project = nn.Linear(image_width, embed)
    self.text_project = nn.Linear(width, embed)
    self.temperature = nn.Parameter(torch.tensor(0.07))
    self.match = nn.Linear(width, 2)
    self.transform = nn.Sequential(
      nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width)
    )
    self.offset = nn.Parameter(torch.zeros(sizes["vocab"]))

  def fuse(self, text, image):
    for block in self.fusion:
      text = block(text, image)
    return text

  def forward(self, image, text):
    patches, words = self.image(image), self.text(text)
    zimg = functional.normalize(self.image_project(patches[:, 0]), dim=-1)
    ztxt = functional.normalize(self.text_project(words[:, 0]), dim=-1)
    loss = training.contrast(zimg, ztxt, 1 / self.temperature)
    similarity = zimg @ ztxt.T / self.temperature
    other_text = training.negatives(similarity)
    other_image = training.negatives(similarity.T)
    fused = self.fuse(
      torch.cat([words, words, words[other_text]]),
      torch.cat([patches, patches[other_image], patches]),
    )
    labels = torch.zeros(len(fused), dtype=torch.long, device=text.device)
    labels[: len(text)] = 1
    loss = loss + functional.cross_entropy(self.match(fused[:, 0]).float(), labels)
    ids, labels = training.masked(text)
    hidden = self.transform(self.fuse(self.text(ids), patches))
    scores = functional.linear(hidden, self.text.table.weight, self.offset)
    return loss + functional.cross_entropy(
      scores.flatten(0, 1).float(), labels.flatten()
    )


if __name__ == "__main__":
  training.main(Albef, training.pairs)
