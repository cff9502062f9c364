"""Checkpoints of dual encoders (CLIP, SigLIP): what their layouts share.

A layout is a table of rules for two towers, and where in it to look for their sizes.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import os
import re
from typing import Any

import numpy as np

from vlp_jax.interop import layout
from vlp_jax.interop import rules
from vlp_jax.interop import towers
from vlp_jax.ops import tree as tree_lib

# Where the bias of a sigmoid loss is.
BIAS = "objectives_itc/bias"


# Of a model that was trained here, what no dual encoder of others has: SigLIP 2's
# decoder, its token for hidden patches, heads of other objectives.
BESIDE = r"model/decoder/.*|model/image/mask|objectives_(?!itc/bias$).*"


def towers_of(params: Mapping[str, Any]) -> dict[str, Any]:
  """The parameters of a pretrainer without what is `BESIDE` the towers."""
  leaves = tree_lib.flatten(params)
  return rules.nest({k: x for k, x in leaves.items() if not re.fullmatch(BESIDE, k)})


@dataclasses.dataclass(frozen=True)
class Layout:
  """How someone names and arranges the tensors of a dual encoder.

  Attributes:
    what: for messages: "an OpenAI CLIP checkpoint".
    table: (depth of the image tower, of the text tower) -> rules.
    image_layer, text_layer: prefixes of the layers' names, `{i}` for the layer.
    image_norm, text_norm: tensors as long as each tower is wide.
    skip: patterns of names that say nothing.
  """

  what: str
  table: Callable[[int, int], rules.Table]
  image_layer: str
  text_layer: str
  image_norm: str
  text_norm: str
  skip: tuple[str, ...] = ()

  def read(
    self,
    tensors: Mapping[str, np.ndarray],
    path: str | os.PathLike,
    *,
    num_heads_image: int | None = None,
    num_heads_text: int | None = None,
  ) -> dict[str, Any]:
    """Parameters as they are in the file, with its types.

    Args:
      tensors: of the file. path: for messages.
      num_heads_image, num_heads_text: None: heads are 64 wide.
    """
    sizes = dict(
      M=towers.heads(tensors, self.image_norm, num_heads_image, "num_heads_image"),
      N=towers.heads(tensors, self.text_norm, num_heads_text, "num_heads_text"),
    )
    return rules.from_theirs(
      tensors,
      self.table(*self._depths(tensors, path)),
      sizes=sizes,
      skip=self.skip,
      what=f"{path}, as {self.what},",
    )

  def fit(
    self,
    tensors: Mapping[str, np.ndarray],
    path: str | os.PathLike,
    abstract_params: Mapping[str, Any],
    *,
    skip: Sequence[str] = (),
    fresh: Sequence[str] = (),
  ) -> dict[str, Any]:
    """Parameters of a model from a file: see `rules.from_theirs`."""
    depths, sizes = self.sizes(abstract_params)
    return rules.from_theirs(
      tensors,
      self.table(*depths),
      sizes=sizes,
      shapes=abstract_params,
      skip=(*self.skip, *skip),
      fresh=fresh,
      what=f"{path}, as {self.what} for this model,",
    )

  def write(self, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """{name: tensor} of a tree of ours; gradients have the same tree."""
    depths, sizes = self.sizes(params)
    return rules.to_theirs(
      params, self.table(*depths), sizes=sizes, what=f"the model, as {self.what},"
    )

  def sizes(self, params: Mapping[str, Any]) -> tuple[tuple[int, int], dict[str, int]]:
    """(depths, letters) that the rules need to know of a tree of ours."""
    wanted = [f"model/{t}/blocks/attn/query/kernel" for t in ("image", "text")]
    refusal = f"this model cannot be {self.what} (a ViT and a text encoder)"
    found = layout.shapes(params, [*wanted, layout.PATCH], refusal)
    image, text, patch = found.values()
    return (image[0], text[0]), dict(M=image[2], N=text[2], **layout.sides(patch))

  def _depths(self, tensors, path):
    what = f"{path} is not {self.what}"
    layers = (self.image_layer, self.text_layer)
    return [towers.depth(tensors, layer, what) for layer in layers]
