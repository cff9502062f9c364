"""The word of the pp string that reads regions of a detector in the place of pixels."""

from typing import Literal

import numpy as np

from vlp_jax.data import regions as regions_lib
from vlp_jax.data.ops_image import Op


def regions(
  most: int,
  layout: Literal["uniter", "vlp"] = "uniter",
  features: int = 2048,
  classes: int = 1601,
  fewest: int = 10,
  threshold: float = 0.2,
) -> Op:
  """File of regions -> float32 [most, F + P + C + 1], rows of 0 behind the last one.

  See `data/regions.py` for the file, and `models/regions.py` for who reads the rows.

  Args:
    most: rows. layout: whose numbers of a place, with UNITER's 7 or VLP's 6 + classes.
    features, classes: how wide these are in the file; 0 classes: they are not read.
    fewest, threshold: a region counts that is as sure as that, but at least so many
      do; those of VLP are all counted: threshold=0.0.
  """
  if not 1 <= fewest <= most:
    raise ValueError(f"most={most}, fewest={fewest}: want 1 <= fewest <= most.")
  if features < 1 or classes < 0:
    raise ValueError(
      f"features={features}, classes={classes}: want 1 or more, and 0 or more."
    )

  def op(example, rng):
    del rng
    data = example["image"]
    if not isinstance(data, bytes):
      raise ValueError("pp: regions: the image is decoded already: leave decode out.")
    found = regions_lib.load(data)
    kept = regions_lib.count(
      found.get("conf"),
      len(found["features"]),
      most=most,
      fewest=fewest,
      threshold=threshold,
    )
    rows = regions_lib.rows(found, layout, features, classes, kept)
    out = np.zeros((most, rows.shape[1]), np.float32)
    out[:kept] = rows
    return example | {"image": out}

  return op
