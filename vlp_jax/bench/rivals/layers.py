"""Transformer layers of torch.nn and scaled_dot_product_attention, for rivals in _nn.

For machines that have torch alone. Names and order are of the papers; nothing is slower
than it has to be: queries, keys and values come of one product.
"""

import torch
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
  """Of x to itself, or to a memory."""

  def __init__(self, width, heads, memory_width=None):
    super().__init__()
    self.heads, self.crosses = heads, memory_width is not None
    if self.crosses:
      self.query = nn.Linear(width, width)
      self.memory = nn.Linear(memory_width, 2 * width)
    else:
      self.inputs = nn.Linear(width, 3 * width)
    self.out = nn.Linear(width, width)

  def forward(self, x, memory=None, causal=False):
    if self.crosses:
      parts = [self.query(x), *self.memory(memory).chunk(2, dim=-1)]
    else:
      parts = self.inputs(x).chunk(3, dim=-1)
    query, key, value = (
      p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts
    )
    mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
    return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
  """Pre-norm (ViT, CLIP) or post-norm (BERT), with attention to a memory or without."""

  def __init__(self, sizes, *, memory_width=None, post=False):
    super().__init__()
    width, heads = sizes["width"], sizes["num_heads"]
    self.post = post
    self.attention = Attention(width, heads)
    self.norms = nn.ModuleList(
      nn.LayerNorm(width) for _ in range(2 if memory_width is None else 3)
    )
    if memory_width is not None:
      self.cross = Attention(width, heads, memory_width)
    self.mlp = nn.Sequential(
      nn.Linear(width, sizes["mlp_dim"]),
      nn.GELU(),
      nn.Linear(sizes["mlp_dim"], width),
    )

  def forward(self, x, memory=None, causal=False):
    layers = [lambda y: self.attention(y, causal=causal)]
    if memory is not None:
      layers.append(lambda y: self.cross(y, memory))
    for norm, layer in zip(self.norms, [*layers, self.mlp], strict=True):
      x = norm(x + layer(x)) if self.post else x + layer(norm(x))
    return x


class Vit(nn.Module):
  """Image [B, 3, R, R] -> [B, P + 1, D], with a class token."""

  def __init__(self, sizes):
    super().__init__()
    width, patch = sizes["image"]["width"], sizes["patch"]
    self.patches = nn.Conv2d(3, width, patch, patch)
    self.cls = nn.Parameter(torch.zeros(1, 1, width))
    count = (sizes["res"] // patch) ** 2 + 1
    self.position = nn.Parameter(0.02 * torch.randn(count, width))
    depth = sizes["image"]["depth"]
    self.blocks = nn.ModuleList(Block(sizes["image"]) for _ in range(depth))
    self.norm = nn.LayerNorm(width)

  def forward(self, image):
    x = self.patches(image).flatten(2).transpose(1, 2)
    x = torch.cat([self.cls.expand(len(x), 1, -1).to(x.dtype), x], dim=1)
    x = x + self.position
    for block in self.blocks:
      x = block(x)
    return self.norm(x)


class Words(nn.Module):
  """Ids [B, L] -> [B, L, D]: embeddings, and layers of either kind."""

  def __init__(self, sizes, *, post, causal):
    super().__init__()
    text = sizes["text"]
    self.causal, self.post = causal, post
    self.table = nn.Embedding(sizes["vocab"], text["width"])
    self.position = nn.Parameter(0.02 * torch.randn(sizes["positions"], text["width"]))
    self.blocks = nn.ModuleList(Block(text, post=post) for _ in range(text["depth"]))
    self.norm = nn.LayerNorm(text["width"])

  def forward(self, text):
    x = self.table(text) + self.position[: text.shape[1]]
    x = self.norm(x) if self.post else x
    for block in self.blocks:
      x = block(x, causal=self.causal)
    return x if self.post else self.norm(x)
