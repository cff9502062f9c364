"""CLIP with a ViT, as OpenAI and open_clip name its tensors (clip/model.py).

OpenAI's downloads are TorchScript archives of 16-bit weights (`convert_weights`) and
have three numbers more, which open_clip's files do not have.
"""

from collections.abc import Mapping, Sequence
import functools
import math
import os
import re
from typing import Any

import numpy as np

from vlp_jax.interop import dual
from vlp_jax.interop import made_with as made_with_lib
from vlp_jax.interop import reader
from vlp_jax.interop import rules
from vlp_jax.interop import towers
from vlp_jax.ops import tree as tree_lib

# Only OpenAI's files have it, and those are all made with QuickGELU.
OPENAI = "input_resolution"
SIGNATURE = (
  r"visual\.conv1\.weight",
  r"transformer\.resblocks\.0\.attn\.in_proj_weight",
  r"text_projection",
  r"!visual\.attnpool\..*",  # clip_resnet's
)
NORM_EPS = 1e-5  # torch's own
# What clip/model.py `convert_weights` halves: convolutions, linear layers, attention
# and the projections; not tables, norms and the scale.
HALVED = re.compile(
  r"visual\.conv1\.weight|visual\.proj|text_projection"
  r"|.*\.(in_proj_weight|in_proj_bias)|.*\.(out_proj|c_fc|c_proj)\.(weight|bias)"
)


def load(
  path: str | os.PathLike,
  *,
  num_heads_image: int | None = None,
  num_heads_text: int | None = None,
  key: str | None = None,
) -> dict[str, Any]:
  """Parameters from an official file (ViT-B-32.pt, open_clip_model.safetensors).

  Args:
    path: see `reader.load`, also for `key`.
    num_heads_image, num_heads_text: None: heads are 64 wide, as all of OpenAI's are.

  Returns:
    {"model": …} of the file's types, so that `save` gives the same bits.

  Raises:
    FileNotFoundError, ValueError: see `reader.load` and `rules.from_theirs`.
  """
  tensors = reader.load(path, key=key)
  layout = _layout(openai=OPENAI in tensors)
  return layout.read(
    tensors, path, num_heads_image=num_heads_image, num_heads_text=num_heads_text
  )


def save(
  path: str | os.PathLike,
  params: Mapping[str, Any],
  *,
  openai: bool | None = None,
  key: str | None = None,
) -> None:
  """Writes a file that open_clip, and with `openai` clip's `build_model`, reads.

  Args:
    path: .pt or .safetensors, see `reader.save`, also for `key`.
    params: tree of arrays, without boxes; nothing but {"model": …}.
    openai: with the three numbers, and weights in 16 bits, as OpenAI's files are; None:
      where the weights are in 16 bits and the norms are not.
  """
  if openai is None:
    image = params["model"]["image"]
    kernel, norm = image["patch"]["kernel"].dtype, image["norm"]["scale"].dtype
    openai = kernel == np.float16 and norm == np.float32
  tensors = _layout(openai=openai).write(params)
  if openai:
    tensors = {
      name: x.astype(np.float16) if HALVED.fullmatch(name) else x
      for name, x in tensors.items()
    }
  reader.save(path, tensors, key=key)


def export(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """A tree of the parameters' shape (gradients) under official names."""
  return _layout(openai=False).write(params)


def init(
  abstract_params: Mapping[str, Any],
  *,
  path: str | os.PathLike,
  into: str | None = None,
  key: str | None = None,
  skip: Sequence[str] = (),
  fresh: Sequence[str] = (),
  model: Any = None,
  made_with: made_with_lib.Told | None = None,
) -> dict[str, Any]:
  """Parameters of a model from an official file: `c.init = dict(type="clip", path=…)`.

  The table of image positions is resized to the model's grid, bicubic, and with
  antialiasing in files of open_clip, which does it so. Floats become the model's.

  Args:
    abstract_params: the model's tree, without boxes; leaves have shape and dtype.
    path, key: see `reader.load`.
    into: path of an image tower, which alone is filled, without the projection (METER);
      None: the whole model.
    skip: regular expressions of whole names in the file that the model does not use,
      such as layers that the tower does not have.
    fresh: of whole paths of the model that the file does not have. There the result
      holds the leaf of `abstract_params`, for the caller to draw.
    model: the `VLM`: its activation and epsilon must be those of the file. Files of
      open_clip do not tell the activation.
    made_with: see `made_with`.

  Raises:
    FileNotFoundError, ValueError: one error that lists all that does not fit.
  """
  tensors = reader.load(path, key=key)
  openai = OPENAI in tensors
  layers = dict(norm_eps=NORM_EPS) | (dict(act="quick_gelu") if openai else {})
  names = ("image", "text") if into is None else (into.removeprefix("model/"),)
  made = made_with_lib.of(**dict.fromkeys(names, layers))
  made_with_lib.check(model, made, path, made_with)
  if into is not None:
    return _fill_image(abstract_params, tensors, path, into, skip, fresh)
  return _layout(openai=openai).fit(
    lambda: tensors, path, abstract_params, skip=skip, fresh=fresh
  )


def _fill_image(abstract_params, tensors, path, into, skip, fresh):
  """The image tower `into` alone; see `init`."""
  query = tree_lib.flatten(abstract_params).get(f"{into}/blocks/attn/query/kernel")
  depth = 0 if query is None else query.shape[0]
  return rules.fill(
    abstract_params,
    [into],
    {name: x for name, x in tensors.items() if name.startswith("visual.")},
    towers.clip_vit_rules("visual.", into, depth),
    sizes={} if query is None else dict(M=query.shape[2]),
    skip=(r"visual\.proj", *skip),
    fresh=fresh,
    what=f"the image tower of {path}, for this model,",
  )


def parameter_rules(depth_image: int, depth_text: int, *, openai: bool) -> rules.Table:
  """The state dict <-> {"model": …} (sizes of `towers`, E embedding)."""
  how = "bicubic" if openai else "antialiased"
  table = [
    *towers.clip_vit_rules("visual.", "model/image", depth_image, how=how),
    *towers.clip_text_rules("", "model/text", depth_text),
    rules.Rule("visual.proj", "model/image_proj/kernel", "W E -> W E"),
    rules.Rule("text_projection", "model/text_proj/kernel", "D E -> D E"),
    rules.Rule("logit_scale", "model/log_scale", "->"),
  ]
  if openai:
    side = lambda sizes: math.isqrt(sizes["L"] - 1) * sizes["p"]
    table += [
      rules.Constant(OPENAI, lambda sizes: np.int64(side(sizes))),
      rules.Constant("context_length", lambda sizes: np.int64(sizes["T"])),
      rules.Constant("vocab_size", lambda sizes: np.int64(sizes["V"])),
    ]
  return table


def _layout(*, openai):
  return dual.layout(
    "an OpenAI CLIP checkpoint" if openai else "a CLIP checkpoint of open_clip",
    functools.partial(parameter_rules, openai=openai),
    image_layer="visual.transformer.resblocks.{i}.",
    text_layer="transformer.resblocks.{i}.",
    image_norm="visual.ln_pre.weight",
    text_norm="ln_final.weight",
  )
