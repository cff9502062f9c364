"""Regions that a detector has found: their file, and what models read of them.

The file is an .npz of one image, as UNITER publishes them (scripts/convert_imgdir.py;
made by https://github.com/peteanderson80/bottom-up-attention), R regions in it:

  features      float [R, F]  what they look like (2,048 of the detector's last layers)
  norm_bb       float [R, 6]  x1, y1, x2, y2, width, height, as shares of the image's
  soft_labels   float [R, C]  class probabilities (1,601, of which the first is ground)
  conf          float [R]     confidence; missing: all count

In the place of `norm_bb` there may be `boxes`, float [R, 4], x1, y1, x2, y2 in pixels,
with `size`, two numbers, width and height of the image. VLP scales boxes by the largest
of their coordinates, and wants pixels for that.

Shape letters: R regions, F features, P numbers of a place, C classes.
"""

from collections.abc import Mapping
import io
import zipfile

import numpy as np

from vlp_jax.data.decode import BadRecordError

EPS = 1e-5
# An .npz that says it is larger than that is taken for a decompression bomb.
MAX_BYTES = 256_000_000
NUMBERS = {"uniter": 7, "vlp": 6}  # of a place, beside VLP's class probabilities
ARRAYS = ("features", "norm_bb", "boxes", "size", "soft_labels", "conf")


def load(data: bytes) -> dict[str, np.ndarray]:
  """The arrays of a file that have to do with regions, float32, checked.

  Raises:
    BadRecordError: empty, no .npz, damaged, too large, or arrays that do not go
      together.
  """
  if not data:
    raise BadRecordError("empty file")
  try:
    with zipfile.ZipFile(io.BytesIO(data)) as parts:
      if sum(part.file_size for part in parts.infolist()) > MAX_BYTES:
        raise BadRecordError("regions are too large")
    # Nothing is unpickled.
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
      found = {name: np.float32(file[name]) for name in ARRAYS if name in file}
  except BadRecordError:
    raise
  except MemoryError:
    raise
  except Exception as error:  # zipfile, zlib and numpy raise anything on damaged bytes
    raise BadRecordError("no .npz of regions", f"{type(error).__name__}") from error
  _check(found)
  return found


def save(path, **arrays: np.ndarray) -> None:
  """Writes a file of regions: `ARRAYS` by name.

  Raises:
    BadRecordError: they do not go together.
  """
  _check({name: np.float32(x) for name, x in arrays.items()})
  np.savez_compressed(path, **arrays)


def _check(found):
  """Raises BadRecordError if these are not the arrays of an image."""
  missing = [name for name in ("features",) if name not in found]
  if "norm_bb" not in found and not {"boxes", "size"} <= found.keys():
    missing.append("norm_bb (or boxes with size)")
  if missing:
    raise BadRecordError("regions lack arrays", ", ".join(missing))
  widths = {"norm_bb": 6, "boxes": 4}
  rows = len(found["features"]) if found["features"].ndim else 0
  for name, x in found.items():
    if name == "size":
      fits = x.shape == (2,) and (x > 0).all()
    elif name == "conf":
      fits = x.shape == (rows,)
    else:
      width = widths.get(name, x.shape[-1] if x.ndim else 0)
      fits = x.shape == (rows, width)
    if not fits:
      shapes = ", ".join(f"{n} {list(a.shape)}" for n, a in found.items())
      raise BadRecordError("regions do not go together", shapes)
    if not np.isfinite(x).all():
      raise BadRecordError("regions are not finite", name)
  if not rows:
    raise BadRecordError("no regions")


def count(
  conf: np.ndarray | None, rows: int, *, most: int, fewest: int, threshold: float
) -> int:
  """How many of an image's regions are read: the first so many.

  UNITER's (official data/data.py compute_num_bb): those of a confidence above the
  threshold, but at least `fewest` and at most `most`, where there are as many.
  """
  sure = rows if conf is None else int((conf > threshold).sum())
  return min(max(fewest, sure), most, rows)


def rows(
  found: Mapping[str, np.ndarray], layout: str, features: int, classes: int, kept: int
) -> np.ndarray:
  """float32 [kept, F + P + C + 1]: what a model reads of the first regions.

  Features, numbers of the place, classes, and 1: there is a region. In VLP's layout
  the classes are of the place: P is 6 + C, and none stand behind.

  Args:
    found: of `load`. layout: "uniter" or "vlp".
    features, classes: F and C; 0 classes: they are not wanted.

  Raises:
    BadRecordError: the file has others.
  """
  has = found["features"].shape[1]
  if has != features:
    raise BadRecordError(
      "regions of another width",
      f"features of {has} numbers, but data.pp says regions(features={features})",
    )
  labels = found.get("soft_labels")
  if classes and (labels is None or labels.shape[1] != classes):
    has = 0 if labels is None else labels.shape[1]
    raise BadRecordError(
      "regions of other classes",
      f"soft_labels of {has}, but data.pp says regions(classes={classes})",
    )
  labels = labels if classes else np.zeros((len(found["features"]), 0), np.float32)
  if layout == "vlp":
    # All boxes decide the scale, also of those that are not kept.
    parts = [found["features"], places(vlp_boxes(found), labels)]
  else:
    parts = [found["features"], uniter_places(found), labels]
  parts.append(np.ones((len(labels), 1), np.float32))
  return np.concatenate(parts, axis=1)[:kept]


def uniter_places(found: Mapping[str, np.ndarray]) -> np.ndarray:
  """float32 [R, 7]: x1, y1, x2, y2, width, height and area, as shares of the image's.

  UNITER, section 3.1; official data/data.py `_get_img_feat`.
  """
  if "norm_bb" in found:
    box = found["norm_bb"]
  else:
    width, height = found["size"]
    corners = found["boxes"] / np.array([width, height, width, height], np.float32)
    box = np.concatenate([corners, corners[:, 2:] - corners[:, :2]], axis=1)
  return np.concatenate([box, box[:, 4:5] * box[:, 5:]], axis=1)


def vlp_boxes(found: Mapping[str, np.ndarray]) -> np.ndarray:
  """float32 [R, 6] for `places`: the corners in pixels, 0 and the confidence."""
  if "boxes" not in found:
    raise BadRecordError("regions lack arrays", "boxes, in pixels, which VLP scales")
  conf = found.get("conf", np.ones(len(found["boxes"]), np.float32))
  rest = np.stack([np.zeros_like(conf), conf], axis=1)
  return np.concatenate([found["boxes"], rest], axis=1)


def places(boxes: np.ndarray, classes: np.ndarray) -> np.ndarray:
  """float32 [R, 6 + C] of one image: box, area and confidence, then classes.

  VLP's (official vlp/seq2seq_loader.py Preprocess4Seq2seq): coordinates as parts of the
  largest ones that the image has, and both parts normed as by a layer norm.

  Args:
    boxes: float [R, 6], x1, y1, x2, y2, a number that is not read, confidence.
    classes: float [R, C], probabilities.

  Raises:
    ValueError: other shapes, or boxes without extent.
  """
  boxes = np.array(boxes, np.float32)
  classes = np.asarray(classes, np.float32)
  if boxes.ndim != 2 or boxes.shape[1] != 6 or len(classes) != len(boxes):
    raise ValueError(
      f"regions: boxes {list(boxes.shape)} and classes {list(classes.shape)}: want"
      " [R, 6] and [R, C]."
    )
  largest = [boxes[:, side::2][:, :2].max() + np.float32(EPS) for side in (0, 1)]
  if min(largest) <= 0:
    raise BadRecordError("regions without extent")
  boxes[:, [0, 2]] /= largest[0]
  boxes[:, [1, 3]] /= largest[1]
  area = (boxes[:, 3] - boxes[:, 1]) * (boxes[:, 2] - boxes[:, 0])
  boxes[:, 4] = np.maximum(area, 0.0)
  return np.concatenate([_normed(boxes), _normed(classes)], axis=1)


def _normed(x):
  """A layer norm without parameters over the last axis, as torch's."""
  if not x.shape[-1]:
    return x
  centred = x - x.mean(axis=-1, keepdims=True)
  variance = (centred**2).mean(axis=-1, keepdims=True)
  return centred / np.sqrt(variance + EPS)
