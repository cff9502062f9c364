"""The fields of `bench input`, on a few drawn pictures."""

import json
import tarfile

import pytest

from tests.data import pictures
from vlp_jax.bench import input as input_lib


def test_files_a_table_and_an_archive_of_them(tmp_path):
  images = tmp_path / "given"
  images.mkdir()
  for i in range(3):
    data = pictures.encoded(pictures.pixels(seed=i), "JPEG")
    (images / f"pic{i}.jpg").write_bytes(data)
  folder = tmp_path / "prepared"
  folder.mkdir()
  said = input_lib.prepare(folder, images, 2)
  assert said["files"] == 2
  names = ["000000.jpg", "000001.jpg"]
  table = (folder / "table.jsonl").read_text().splitlines()
  assert [json.loads(line)["image"] for line in table] == names
  with tarfile.open(folder / "images.tar") as tar:
    assert tar.getnames() == names
  with pytest.raises(FileNotFoundError, match="no such folder or .zip"):
    input_lib.prepare(folder, tmp_path / "none", 2)


def test_unknown_readers_are_told(capsys):
  with pytest.raises(SystemExit):
    input_lib.main(["--against=torch"])
  assert "there are torch_loader, webdataset" in capsys.readouterr().err


@pytest.mark.slow
def test_all_rates_and_ratios(tmp_path):
  pytest.importorskip("simplejpeg")
  pytest.importorskip("cv2")
  out = tmp_path / "input.json"
  sizes = ["--count=24", "--round=16", "--batch_size=8", "--res=48", "--repeats=2"]
  input_lib.main([*sizes, "--against=", f"--out={out}"])
  found = json.loads(out.read_text())
  one = found["one_core"]
  for reader in ("ours", "ours_exact", "bare"):
    assert one[reader]["images_per_cpu_second"] > 0
    assert one[reader]["images_per_second"] >= one[reader]["median"]
  rates = [one[name]["images_per_cpu_second"] for name in ("ours", "bare")]
  assert one["ratios"]["ours/bare"] == pytest.approx(rates[0] / rates[1])
  assert 0 <= found["waiting"]["share"] <= 1
  assert found["waiting"]["step_ms"] == pytest.approx(
    input_lib.SLOWER * found["waiting"]["input_ms"]
  )
