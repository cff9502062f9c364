"""Tables of bottom-up attention become files of regions."""

import base64

import numpy as np
import pytest

from vlp_jax.data import region_tables
from vlp_jax.data import regions


def encoded(x):
  return base64.b64encode(np.float32(x).tobytes()).decode()


def line(name, count=3, **changed):
  rng = np.random.default_rng(count)
  boxes = np.sort(rng.uniform(0, 40, (count, 4)), axis=1)
  row = dict(
    image_id=name,
    image_w=64,
    image_h=48,
    num_boxes=count,
    boxes=encoded(boxes),
    features=encoded(rng.normal(size=(count, 8))),
  )
  return boxes, "\t".join(map(str, (row | changed).values()))


def test_each_row_is_a_file(tmp_path, capsys):
  path, out = tmp_path / "t.tsv", tmp_path / "out"
  boxes, first = line("7")
  _, second = line("8", 5)
  path.write_text(f"{first}\n{second}\n")
  region_tables.main([f"--table={path}", f"--out={out}"])
  assert "2 images" in capsys.readouterr().out
  found = regions.load((out / "7.npz").read_bytes())
  np.testing.assert_array_equal(found["boxes"], np.float32(boxes))
  np.testing.assert_array_equal(found["size"], [64, 48])
  assert found["features"].shape == (3, 8)
  assert regions.load((out / "8.npz").read_bytes())["features"].shape == (5, 8)


def test_classes_and_confidence_are_kept(tmp_path):
  path = tmp_path / "t.tsv"
  labels, sure = np.full((3, 4), 0.25), np.array([0.9, 0.5, 0.1])
  path.write_text("\t".join([line("7")[1], encoded(labels), encoded(sure), "x"]))
  fields = (*region_tables.FIELDS, "cls_prob", "scores", "objects_id")
  ((name, arrays),) = region_tables.rows(path, fields)
  assert name == "7"
  np.testing.assert_array_equal(arrays["soft_labels"], np.float16(labels))
  np.testing.assert_array_equal(arrays["conf"], np.float32(sure))


@pytest.mark.parametrize(
  "text, said",
  [
    ("7\t64\t48", "line 1: 3 columns, want 6"),
    (line("7", num_boxes="many")[1], "line 1: invalid literal"),
    (line("7", num_boxes=5)[1], "line 1: cannot reshape"),
    (line("7", boxes="%%%")[1], "line 1: "),
    (
      line("7", boxes=encoded(np.zeros((3, 5))))[1],
      "image 7: regions do not go together",
    ),
  ],
)
def test_rows_that_are_none(tmp_path, capsys, text, said):
  path = tmp_path / "t.tsv"
  path.write_text(text)
  with pytest.raises(SystemExit) as ended:
    region_tables.main([f"--table={path}", f"--out={tmp_path / 'out'}"])
  assert ended.value.code == 2 and said in capsys.readouterr().err
