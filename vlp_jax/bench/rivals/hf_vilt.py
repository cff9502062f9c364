"""ViLT's pretraining of Hugging Face's modules: matching, and masked words.

Two passes over the image, one with masked words and one with replaced images, as the
official code has them. transformers' head of masked words and pooler are used; the
images are squares, so that both have the same patches.
"""

import torch
import transformers
from transformers.models.vilt import modeling_vilt

from vlp_jax.bench.rivals import training


class Vilt(torch.nn.Module):
  """ViltModel with both heads."""

  def __init__(self, sizes):
    super().__init__()
    fusion = sizes["fusion"]
    config = transformers.ViltConfig(
      vocab_size=sizes["vocab"],
      hidden_size=sizes["text"]["width"],
      intermediate_size=fusion["mlp_dim"],
      num_hidden_layers=fusion["depth"],
      num_attention_heads=fusion["num_heads"],
      hidden_dropout_prob=0.1,
      attention_probs_dropout_prob=0.0,
      image_size=sizes["res"],
      patch_size=sizes["patch"],
      max_position_embeddings=sizes["length"],
      max_image_length=-1,
    )
    self.model = modeling_vilt.ViltModel(config)
    self.words = modeling_vilt.ViltMLMHead(config)
    self.match = torch.nn.Linear(config.hidden_size, 2)

  def forward(self, image, text):
    cross_entropy = torch.nn.functional.cross_entropy
    rows, length = text.shape
    mask = torch.ones(image.shape[0], *image.shape[2:], device=image.device).long()
    both = {"pixel_mask": mask, "attention_mask": torch.ones_like(text)}
    ids, labels = training.masked(text)
    fused = self.model(input_ids=ids, pixel_values=image, **both)
    scores = self.words(fused.last_hidden_state[:, :length])
    loss = cross_entropy(scores.flatten(0, 1).float(), labels.flatten())
    kept = torch.arange(rows, device=text.device) % 2
    images = torch.where(kept[:, None, None, None] == 1, image, image.roll(1, 0))
    pooled = self.model(input_ids=text, pixel_values=images, **both).pooler_output
    return loss + cross_entropy(self.match(pooled).float(), kept)


if __name__ == "__main__":
  training.main(Vilt, training.pairs, transformers=transformers.__version__)
