"""Files of regions from the tables of bottom-up attention: one .npz an image.

  python -m vlp_jax.data.region_tables --table=trainval.tsv --out=regions

The table is what https://github.com/peteanderson80/bottom-up-attention publishes
(tools/generate_tsv.py): a row for each image with its id, width, height and number of
boxes, and in base64 float32 `boxes` [R, 4] in pixels and `features` [R, 2048]. Those
with class probabilities (`cls_prob`, `scores`) keep them. The files are IMAGE_ID.npz,
see data/regions.py; they hold 16-bit features, as UNITER's do.
"""

import argparse
import base64
import binascii
from collections.abc import Iterator
import pathlib
import sys

import numpy as np

from vlp_jax.data import regions

FIELDS = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")
# Columns that some tables have behind these: name -> name in the file.
MORE = {"cls_prob": "soft_labels", "scores": "conf"}


def rows(
  path: pathlib.Path, fields: tuple[str, ...] = FIELDS
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
  """(image id, arrays of `regions.save`) of each row of a table.

  Args:
    path: of the .tsv, which has no header.
    fields: its columns; those that are in neither FIELDS nor MORE are not read.

  Raises:
    ValueError: a row that is not of these columns, or whose numbers do not fit.
  """
  lacks = [name for name in FIELDS if name not in fields]
  if lacks:
    raise ValueError(f"--fields lacks {', '.join(lacks)}.")
  with path.open(encoding="utf-8") as lines:
    for number, line in enumerate(lines, 1):
      row = line.rstrip("\n").split("\t")
      where = f"{path}, line {number}"
      if len(row) != len(fields):
        raise ValueError(
          f"{where}: {len(row)} columns, want {len(fields)}: {', '.join(fields)}; say"
          " --fields, with commas, where they are others."
        )
      yield _arrays(dict(zip(fields, row, strict=True)), where)


def _arrays(row, where):
  try:
    count = int(row["num_boxes"])
    arrays = {
      "size": np.array([int(row["image_w"]), int(row["image_h"])]),
      "boxes": _decoded(row["boxes"], count),
      "features": _decoded(row["features"], count).astype(np.float16),
    }
    for theirs, ours in MORE.items():
      if theirs in row:
        found = _decoded(row[theirs], count)
        arrays[ours] = found[:, 0] if ours == "conf" else found.astype(np.float16)
  except (ValueError, binascii.Error) as error:
    raise ValueError(f"{where}: {error}") from error
  return row["image_id"], arrays


def _decoded(text, count):
  """float32 [count, n]."""
  flat = np.frombuffer(base64.b64decode(text, validate=True), np.float32)
  return flat.reshape(count, -1)


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--table", required=True, type=pathlib.Path, help="a .tsv")
  parser.add_argument("--out", required=True, type=pathlib.Path, help="folder")
  parser.add_argument("--fields", default=",".join(FIELDS), help="its columns")
  args = parser.parse_args(argv)
  args.out.mkdir(parents=True, exist_ok=True)
  count = 0
  try:
    for name, arrays in rows(args.table, tuple(args.fields.split(","))):
      try:
        regions.save(args.out / f"{name}.npz", **arrays)
      except regions.BadRecordError as error:
        raise ValueError(f"{args.table}: image {name}: {error}") from error
      count += 1
  except (ValueError, OSError) as error:
    print(f"regions: {error}", file=sys.stderr)
    raise SystemExit(2) from error
  print(f"regions: {count} images in {args.out}")


if __name__ == "__main__":
  main()
