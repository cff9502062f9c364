"""Which part of the image each word looks at: cross-attention maps and Grad-CAM.

Grad-CAM is ALBEF's (arXiv:2107.07651, section 6.1 and figure 4; visualization.ipynb of
its code): the cross-attention of one layer times its positive gradient of ITM's match.

Shape letters: K layers, B batch, N heads, L text length, S image tokens, h w patches.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

# Of a fusion stack: the weights of its cross-attention.
CROSS = ("cross", "weights")


def word_maps(
  weights: np.ndarray,
  grid: tuple[int, int],
  *,
  layer: int | None = None,
  gradient: np.ndarray | None = None,
) -> np.ndarray:
  """Attention weights -> maps [B, L, h, w] of one layer, averaged over heads.

  With a gradient, `mean over heads of relu(gradient) * weights`. Tokens before the
  h * w patches (a class token) are dropped; what remains is not rescaled.

  Args:
    weights: float [K, B, N, L, S].
    grid: (h, w), of the patches.
    layer: 0 … K - 1; None: (K - 1) // 2, which is ALBEF's third of six.
    gradient: like `weights`.
  """
  layers, tokens = weights.shape[0], weights.shape[-1]
  height, width = grid
  if tokens < height * width:
    raise ValueError(
      f"{tokens} image tokens are fewer than {height} x {width} patches."
    )
  layer = default_layer(layers) if layer is None else layer
  if not 0 <= layer < layers:
    raise ValueError(f"layer={layer}: the fusion stack has layers 0 … {layers - 1}.")
  maps = np.asarray(weights[layer], np.float32)
  if gradient is not None:
    maps = maps * np.maximum(np.asarray(gradient[layer], np.float32), 0.0)
  maps = maps[..., tokens - height * width :].mean(axis=1)
  return maps.reshape(*maps.shape[:2], height, width)


def default_layer(depth: int) -> int:
  """ALBEF reads the third of its six layers of fusion (visualization.ipynb)."""
  return (depth - 1) // 2


def upsample(maps: np.ndarray, side: int) -> np.ndarray:
  """Maps [..., h, w] -> [..., side, side] between 0 and 1, smoothly.

  Each map is scaled by its own range; one that is flat becomes zero.
  """
  maps = np.asarray(maps, np.float32)
  shape = (*maps.shape[:-2], side, side)
  maps = np.asarray(jax.image.resize(maps, shape, "cubic"))
  low = maps.min(axis=(-2, -1), keepdims=True)
  span = maps.max(axis=(-2, -1), keepdims=True) - low
  return np.where(span > 1e-12, (maps - low) / np.maximum(span, 1e-12), 0.0)


def overlay(image: np.ndarray, heat: np.ndarray, colours: np.ndarray) -> np.ndarray:
  """An image uint8 [R, R, 3], grey, under a map [R, R] in 0 … 1 -> uint8 [R, R, 3].

  `colours` is a table float [n, 3] in 0 … 1 from cold to hot. As in the official
  notebook, the map's own value to the power 0.7 is its opacity; there the image keeps
  its colours, which then mix with the map's.
  """
  alpha = (heat**0.7)[..., None]
  hot = colours[np.clip(heat * (len(colours) - 1), 0, len(colours) - 1).astype(int)]
  grey = image.astype(np.float32).mean(axis=-1, keepdims=True) / 255.0
  mixed = (1.0 - alpha) * grey + alpha * hot
  return np.clip(np.round(255.0 * mixed), 0, 255).astype(np.uint8)


def cross_attention(
  pretrainer: Any,
  params: Any,
  image: np.ndarray,
  ids: np.ndarray,
  mask: np.ndarray,
  *,
  kind: Literal["attention", "gradcam"] = "gradcam",
  objective: str = "itm",
) -> tuple[np.ndarray, np.ndarray | None]:
  """The fusion stack's cross-attention over a batch, and its gradient for Grad-CAM.

  Args:
    pretrainer: with a model whose fusion attends to the image.
    params: its parameters.
    image: uint8 or float [B, R, R, 3].
    ids, mask: [B, L].
    kind: "gradcam" computes the gradient of the ITM logit of "match" too.
    objective: name of the ITM objective, for "gradcam".

  Returns:
    (weights float32 [K, B, N, L, S], gradient of the same shape or None).
  """
  if pretrainer.model.fusion is None:
    raise ValueError(
      "cross-attention maps want a fusion stack; model.fusion is not set."
    )

  def call(m, image, ids, mask):
    images = m.model.encode_image(image)
    texts = m.model.words(ids, mask)
    if kind == "attention":
      return m.model.fuse(images, texts).x
    return m.objectives[objective].score(m.model, images, texts)

  def run(params, probe):
    variables = {"params": params} | probe
    out, sown = pretrainer.apply(
      variables, image, ids, mask, method=call, mutable=["attention"]
    )
    return out, sown["attention"]["model"]["fusion"]

  if kind == "attention":
    _, sown = jax.jit(run)(params, {})
    return np.asarray(find(sown)[1], np.float32), None
  path, shape = find(jax.eval_shape(run, params, {})[1])

  @jax.jit
  def slope(params, probe):
    def total(probe):
      score, sown = run(params, {"perturbations": _nest(path, probe)})
      return score.astype(jnp.float32).sum(), find(sown)[1]

    gradient, weights = jax.grad(total, has_aux=True)(probe)
    return weights, gradient

  weights, gradient = slope(params, jnp.zeros(shape.shape, shape.dtype))
  return np.asarray(weights, np.float32), np.asarray(gradient, np.float32)


def find(sown: Any) -> tuple[tuple[str, ...], jax.Array]:
  """(path in the fusion stack, weights) of the one cross-attention that was sown."""
  leaves = jax.tree_util.tree_flatten_with_path(sown)[0]
  found = []
  for path, value in leaves:
    names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
    if names[-2:] == CROSS:
      found.append((names, value))
  if len(found) != 1:
    raise ValueError(
      f"cross-attention maps want one stack of cross-attention in model.fusion; this"
      f" one has {len(found)}."
    )
  return found[0]


def _nest(path, value):
  for name in reversed(("model", "fusion", *path)):
    value = {name: value}
  return value
