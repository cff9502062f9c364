"""Matching a student's scores of prototypes with a teacher's (DINO), and views.

Caron et al. 2021 (https://arxiv.org/abs/2104.14294), equation 1 and section 3.1;
official dino/main_dino.py DINOLoss.

Shape letters: B batch, K prototypes, R side of an image, V side of a view, C channels.
"""

import jax
import jax.numpy as jnp


def consistency(
  student_K: jax.Array,
  teacher_K: jax.Array,
  center_K: jax.Array,
  *,
  student_temp: float,
  teacher_temp: float,
) -> jax.Array:
  """Cross-entropy of the student's distribution under the teacher's: float32 [...].

  -sum softmax((teacher - center) / teacher_temp) log softmax(student / student_temp).

  Args:
    student_K, teacher_K: float [..., K], shapes that broadcast. No gradient goes to the
      teacher.
    center_K: float [K], running mean of the teacher's scores, which keeps one prototype
      from taking all.
    student_temp, teacher_temp: the teacher's is lower: it is sure of what it says.
  """
  teacher = jax.lax.stop_gradient(teacher_K - center_K).astype(jnp.float32)
  target = jax.nn.softmax(teacher / teacher_temp, axis=-1)
  student = student_K.astype(jnp.float32) / student_temp
  return -jnp.sum(target * jax.nn.log_softmax(student, axis=-1), axis=-1)


def recenter(center_K: jax.Array, teacher_K: jax.Array, momentum: float) -> jax.Array:
  """The center after a batch of the teacher's scores, float [..., K]."""
  mean = teacher_K.astype(jnp.float32).reshape(-1, teacher_K.shape[-1]).mean(axis=0)
  return momentum * center_K + (1.0 - momentum) * jax.lax.stop_gradient(mean)


def windows(
  key: jax.Array,
  count: int,
  *,
  area: tuple[float, float],
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> jax.Array:
  """float32 [count, 4]: (top, left, height, width), as shares of the image.

  Uniform in area and in the logarithm of the aspect ratio; a side that were longer than
  the image is as long as it.
  """
  size_key, shape_key, row_key, column_key = jax.random.split(key, 4)
  share = jax.random.uniform(size_key, (count,), minval=area[0], maxval=area[1])
  low, high = (jnp.log(r) for r in ratio)
  aspect = jnp.exp(jax.random.uniform(shape_key, (count,), minval=low, maxval=high))
  height = jnp.minimum(jnp.sqrt(share / aspect), 1.0)
  width = jnp.minimum(jnp.sqrt(share * aspect), 1.0)
  top = jax.random.uniform(row_key, (count,)) * (1.0 - height)
  left = jax.random.uniform(column_key, (count,)) * (1.0 - width)
  return jnp.stack([top, left, height, width], axis=1)


def crop(image: jax.Array, window: jax.Array, size: int) -> jax.Array:
  """Windows of images, resized: [B, R, R', C] -> [B, size, size, C], of the same type.

  Bilinear; where a window is larger than the view, as a mean over as much more of it.

  Args:
    image: uint8 or float. window: float32 [B, 4] of `windows`.
    size: V.
  """

  def weights(start_B, length_B, side):
    scale_B = length_B * side / size
    at_BV = start_B[:, None] * side + (jnp.arange(size) + 0.5) * scale_B[:, None]
    away = jnp.abs(at_BV[..., None] - (jnp.arange(side) + 0.5))
    near = jnp.maximum(1.0 - away / jnp.maximum(scale_B, 1.0)[:, None, None], 0.0)
    return near / near.sum(axis=-1, keepdims=True)

  view = jnp.einsum(
    "BVR,BWS,BRSC->BVWC",
    weights(window[:, 0], window[:, 2], image.shape[1]),
    weights(window[:, 1], window[:, 3], image.shape[2]),
    image.astype(jnp.float32),
  )
  if image.dtype == jnp.uint8:
    view = jnp.clip(jnp.round(view), 0, 255)
  return view.astype(image.dtype)


def flip(key: jax.Array, image: jax.Array) -> jax.Array:
  """Half of the images [B, R, R', C] mirrored, left to right."""
  chosen = jax.random.bernoulli(key, 0.5, (image.shape[0], 1, 1, 1))
  return jnp.where(chosen, image[:, :, ::-1], image)
