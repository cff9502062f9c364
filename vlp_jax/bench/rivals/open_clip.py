"""open_clip's CLIP (PyPI: open_clip_torch) and its loss."""

import open_clip
import torch

from vlp_jax.bench.rivals import training


class Clip(torch.nn.Module):
  """open_clip.model.CLIP with ClipLoss."""

  def __init__(self, sizes):
    super().__init__()
    image, text = sizes["image"], sizes["text"]
    vision = open_clip.CLIPVisionCfg(
      layers=image["depth"],
      width=image["width"],
      head_width=image["width"] // image["num_heads"],
      mlp_ratio=image["mlp_dim"] / image["width"],
      patch_size=sizes["patch"],
      image_size=sizes["res"],
    )
    words = open_clip.CLIPTextCfg(
      context_length=sizes["length"],
      vocab_size=sizes["vocab"],
      width=text["width"],
      heads=text["num_heads"],
      layers=text["depth"],
    )
    quick = image["act"] == "quick_gelu"
    self.clip = open_clip.CLIP(sizes["embed"], vision, words, quick_gelu=quick)
    self.loss = open_clip.ClipLoss()

  def forward(self, image, text):
    return self.loss(*self.clip(image, text)[:3])


if __name__ == "__main__":
  training.main(Clip, training.pairs, open_clip=open_clip.__version__)
