"""Checkpoints of dual encoders (CLIP, SigLIP): what their layouts share.

Their layout is a table of rules for two towers.
"""

from collections.abc import Callable, Mapping
import re
from typing import Any

from vlp_jax.interop import layout as layout_lib
from vlp_jax.interop import rules
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


def layout(
  what: str,
  table: Callable[..., rules.Table],
  *,
  image_layer: str,
  text_layer: str,
  image_norm: str,
  text_norm: str,
  unused: tuple[str, ...] = (),
) -> layout_lib.Layout:
  """Of the tensors of a dual encoder.

  Args:
    what: for messages: "an OpenAI CLIP checkpoint".
    table: (depth_image=, depth_text=) -> rules.
    image_layer, text_layer: prefixes of the layers' names, `{i}` for the layer.
    image_norm, text_norm: tensors as long as each tower is wide.
    unused: patterns of names that say nothing.
  """
  stack = lambda tower, theirs, letter, norm: layout_lib.Stack(
    theirs,
    f"model/{tower}/blocks/attn/query/kernel",
    letter,
    norm,
    f"num_heads_{tower}",
  )
  return layout_lib.Layout(
    words=layout_lib.Words(
      file=f"{{path}}, as {what},",
      fitted=f"{{path}}, as {what} for this model,",
      other_file=f"{{path}} is not {what}",
      other_model=f"this model cannot be {what} (a ViT and a text encoder)",
      written=f"the model, as {what},",
    ),
    table=table,
    stacks=dict(
      depth_image=stack("image", image_layer, "M", image_norm),
      depth_text=stack("text", text_layer, "N", text_norm),
    ),
    unused=unused,
  )
