"""A global batch: what it looks like on the device, and whether the data give that."""

from collections.abc import Mapping
import inspect
from typing import Any

import jax
import numpy as np

from vlp_jax import config as config_lib
from vlp_jax import feeds as feeds_lib
from vlp_jax.data import columns as columns_lib
from vlp_jax.data import pp
from vlp_jax.data import vocab as vocab_lib


def of(
  feeds: Mapping[str, feeds_lib.Feed], encoder: Any, length: int
) -> dict[str, Any]:
  """The batch of a run: of one kind of data, or {kind: of each}.

  Args:
    encoder: of the model's images. length: of the tokenizer.

  Raises:
    ValueError: images are padded, which the encoder would take for their own.
  """
  found = {}
  for name, feed in feeds.items():
    found[name] = spec(
      feed.batch_size, encoder.res, length, columns=feed.columns, holds=feed.holds
    )
    if feed.holds != "texts" and pp.leaves_sizes(feed.pp):
      check_takes_sizes(encoder, grids=pp.leaves_grids(feed.pp))
      found[name] = with_sizes(found[name])
  return found if len(found) > 1 else found[config_lib.PAIRS]


def spec(
  batch_size: int,
  res: int | tuple[int, ...],
  length: int,
  *,
  columns: columns_lib.Columns | None = None,
  holds: config_lib.Holds = "pairs",
) -> dict[str, jax.ShapeDtypeStruct]:
  """The batch of one kind of data.

  Args:
    res: of the image encoder. length: of the tokenizer.
    columns: what the objectives want beside images and texts.
    holds: what the examples have.
  """
  shapes = dict(
    image=columns_lib.image(res),
    text=((length,), np.int32),
    text_mask=((length,), np.bool_),
    image_id=((), np.int32),
  )
  if columns is not None:
    shapes |= columns.specs
  lacks = columns_lib.LACKS[holds]
  return {
    name: jax.ShapeDtypeStruct((batch_size, *shape), np.dtype(dtype))
    for name, (shape, dtype) in shapes.items()
    if name not in lacks
  }


def with_sizes(
  batch: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.ShapeDtypeStruct]:
  """With the sizes int32 [B, 2] that padded images come with."""
  sizes = {
    f"{key}_size": jax.ShapeDtypeStruct((batch[key].shape[0], 2), np.int32)
    for key in ("image", "image2")
    if key in batch
  }
  return {**batch, **sizes}


def noise(
  specs: Mapping[str, Any], vocab: vocab_lib.Vocab, *, seed: int = 0
) -> dict[str, Any]:
  """A global batch of these shapes that stands for real ones, on the host.

  Images are noise, texts any words at full length, image ids all different; the rest,
  labels and the like, is 0, which is one of them wherever they are counted.

  Args:
    specs: ShapeDtypeStructs; of several kinds of data, {kind: those}.
    vocab: of the text tower.
  """
  rng = np.random.default_rng(seed)
  special = (vocab.pad, vocab.unk, vocab.cls, vocab.sep, vocab.mask)
  special += (vocab.dec, vocab.enc)
  known = [number for number in special if number is not None]
  words = np.setdiff1d(np.arange(vocab.size), known)
  out = {}
  for name, spec in specs.items():
    if isinstance(spec, Mapping):
      out[name] = noise(spec, vocab, seed=seed)
      continue
    shape, dtype = spec.shape, spec.dtype
    if dtype == np.bool_:
      out[name] = np.ones(shape, bool)
    elif dtype == np.uint8:
      out[name] = rng.integers(0, 256, shape, np.uint8)
    elif np.issubdtype(dtype, np.floating):
      out[name] = rng.standard_normal(shape, np.float32).astype(dtype)
    elif name.endswith("image_id"):
      out[name] = np.arange(shape[0], dtype=dtype)
    elif name.endswith("_size"):
      sides = specs[name.removesuffix("_size")].shape[1:3]
      out[name] = np.broadcast_to(np.asarray(sides, dtype), shape)
    elif name.startswith("text"):
      ids = words[rng.integers(0, len(words), shape)].astype(dtype)
      if len(shape) > 1:
        ids[..., 0] = vocab.cls
      out[name] = ids
    else:
      out[name] = np.zeros(shape, dtype)
  return out


def check_takes_sizes(encoder: Any, *, grids: bool = False) -> None:
  """Checks that padded images have an encoder which leaves the padding out.

  grids: they come as rows of patches, with the grid these make.

  Raises:
    ValueError: it reads whole squares.
  """
  takes = inspect.signature(type(encoder).__call__).parameters
  if grids:
    if "grid" not in takes:
      raise ValueError(
        "config: data.pp: naflex(…) makes rows of patches, but the encoder model.image"
        f" ({type(encoder).__module__}) reads squares: say model.image.type='naflex',"
        " or resize(…) instead of naflex(…)."
      )
  elif "size" not in takes:
    raise ValueError(
      "config: data.pp: fit(…) leaves images of several sizes on a canvas, but the"
      f" encoder model.image ({type(encoder).__module__}) reads whole squares: say"
      ' model.image.type="patches", or resize(…) instead of fit(…).'
    )


def check(job: Any, sample: Mapping[str, Any]) -> None:
  """Looks at a few examples of a run's data, before anything is compiled.

  Args:
    job: of a run (`job.Job`).
    sample: as `TrainBatches.sample` or, of several kinds of data, `TurnBatches.sample`.

  Raises:
    ValueError: they are not what the model was built for.
  """
  if job.turns is None:
    return _check_batch(job, sample, job.batch)
  for kind, part in sample.items():
    _check_batch(job, part, job.batch[kind])


def _check_batch(job, first, specs):
  for key, spec in specs.items():
    if key not in first:
      raise ValueError(
        f"config: data: an example has no {key!r}, which an objective wants as"
        f" {spec.dtype}{list(spec.shape[1:])}; data.source gives"
        f" {', '.join(map(repr, first))}. Name a source that has it."
      )
    if first[key].shape[1:] != spec.shape[1:] or first[key].dtype != spec.dtype:
      got, want = (f"{x.dtype}{list(x.shape[1:])}" for x in (first[key], spec))
      hint = ""
      if key == "image":
        hint = " config.data.pp decides its size, model.image.res what the model takes."
        if pp.leaves_regions(job.config.data.pp):
          hint = (
            " Numbers of a region: regions(most, layout, features, classes) of data.pp"
            " must be as model.image's regions, places, features and classes."
          )
      raise ValueError(
        f"config: data: an example's {key} is {got}, but the model takes {want}.{hint}"
      )
