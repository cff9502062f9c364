"""BLIP's pretraining of Hugging Face's modules: contrast, matching, and captions.

transformers has the modules and not their training: the three losses are put together
here as BLIP (https://arxiv.org/abs/2201.12086, section 3.2) does, without its teacher;
matching sees 3 B pairs in one pass.
"""

import torch
import transformers
from transformers.models.blip import modeling_blip
from transformers.models.blip import modeling_blip_text

from vlp_jax.bench.rivals import training


class Blip(torch.nn.Module):
  """Vision model, text model that encodes and fuses, text model that writes."""

  def __init__(self, sizes):
    super().__init__()
    image, fusion = sizes["image"], sizes["fusion"]
    vision = transformers.BlipVisionConfig(
      hidden_size=image["width"],
      intermediate_size=image["mlp_dim"],
      num_hidden_layers=image["depth"],
      num_attention_heads=image["num_heads"],
      image_size=sizes["res"],
      patch_size=sizes["patch"],
    )
    words = transformers.BlipTextConfig(
      vocab_size=sizes["vocab"],
      hidden_size=sizes["text"]["width"],
      encoder_hidden_size=image["width"],
      intermediate_size=fusion["mlp_dim"],
      num_hidden_layers=fusion["depth"],
      num_attention_heads=fusion["num_heads"],
      hidden_dropout_prob=0.1,
      attention_probs_dropout_prob=0.1,
    )
    self.vision = modeling_blip.BlipVisionModel(vision)
    self.encoder = modeling_blip_text.BlipTextModel(words, add_pooling_layer=False)
    self.writer = modeling_blip_text.BlipTextLMHeadModel(words)
    width, embed = sizes["text"]["width"], sizes["embed"]
    self.image_project = torch.nn.Linear(image["width"], embed)
    self.text_project = torch.nn.Linear(width, embed)
    self.match = torch.nn.Linear(width, 2)
    self.temperature = torch.nn.Parameter(torch.tensor(0.07))

  def forward(self, image, text):
    normalize = torch.nn.functional.normalize
    cross_entropy = torch.nn.functional.cross_entropy
    seen = torch.ones_like(text)
    patches = self.vision(image)[0]
    encoded = self.encoder(text, attention_mask=seen)[0]
    zimg = normalize(self.image_project(patches[:, 0]), dim=-1)
    ztxt = normalize(self.text_project(encoded[:, 0]), dim=-1)
    loss = training.contrast(zimg, ztxt, 1 / self.temperature)
    similarity = zimg @ ztxt.T / self.temperature
    other_text = training.negatives(similarity)
    other_image = training.negatives(similarity.T)
    images = torch.cat([patches, patches[other_image], patches])
    texts = torch.cat([text, text, text[other_text]])
    fused = self.encoder(
      texts,
      attention_mask=torch.ones_like(texts),
      encoder_hidden_states=images,
      encoder_attention_mask=torch.ones(images.shape[:2], device=images.device),
    )[0]
    labels = torch.zeros(len(texts), dtype=torch.long, device=text.device)
    labels[: len(text)] = 1
    loss = loss + cross_entropy(self.match(fused[:, 0]), labels)
    written = self.writer(
      text,
      attention_mask=seen,
      encoder_hidden_states=patches,
      encoder_attention_mask=torch.ones(patches.shape[:2], device=patches.device),
      labels=text,
    )
    return loss + written.loss


if __name__ == "__main__":
  training.main(Blip, training.pairs, transformers=transformers.__version__)
