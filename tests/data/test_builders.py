"""TFDS builders, on tiny folders of every layout."""

import io
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import zipfile

import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from vlp_jax.data.builders import flickr8k
from vlp_jax.data.builders import prepare
from vlp_jax.data.builders import scenes
from vlp_jax.data.sources import scenes as scenes_source

SMALL = dict(train_size=12, val_size=5, test_size=4, res=24)


def read(builder, split):
  """All raw examples of a split, in order, strings as text."""
  decoders = {"image": tfds.decode.SkipDecoding()}
  source = builder.as_data_source(split=split, decoders=decoders)

  def text(value):
    if isinstance(value, (list, np.ndarray)):
      return [text(v) for v in value]
    return value.decode() if isinstance(value, bytes) else value

  return [
    {k: v if k == "image" else text(v) for k, v in example.items()}
    for example in source.__getitems__(list(range(len(source))))
  ]


# --- Scenes ---------------------------------------------------------------------------


def test_scenes_are_those_of_the_source(tmp_path, capfd):
  builder = prepare.prepare(scenes.Builder, data_dir=tmp_path, **SMALL)
  for split, size in dict(train=12, val=5, test=4).items():
    source = scenes_source.Source(split, size=size, res=24)
    assert read(builder, split) == source.read(range(size))
  out = capfd.readouterr()
  assert out.out == ""
  assert "scenes" not in out.err
  (folder,) = (tmp_path / "scenes").iterdir()
  assert builder.data_path == folder / "1.0.0"
  assert {f.name for f in folder.iterdir()} == {"1.0.0", ".lock"}
  assert [f.name for f in tmp_path.iterdir()] == ["scenes"]


def test_prepared_once(tmp_path):
  builder = prepare.prepare(scenes.Builder, data_dir=tmp_path, **SMALL)
  info = pathlib.Path(builder.data_path) / "dataset_info.json"
  before = info.stat().st_mtime_ns
  again = prepare.prepare(scenes.Builder, data_dir=tmp_path, **SMALL)
  assert info.stat().st_mtime_ns == before
  assert again.info.splits["train"].num_examples == 12
  for change in (dict(seed=1), dict(twins=0.0), dict(res=32), dict(val_size=6)):
    other = scenes.Builder(data_dir=tmp_path, **{**SMALL, **change})
    assert other.data_path != builder.data_path


def run(script, *args):
  """A Python process of its own."""
  env = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
  command = [sys.executable, "-c", textwrap.dedent(script), *map(str, args)]
  return subprocess.Popen(command, env=env)


def test_of_two_processes_one_writes(tmp_path):
  script = """
    import sys
    from vlp_jax.data.builders import prepare, scenes
    whole = scenes.Builder._generate_examples
    def told(self, name):
      with open(sys.argv[1] + "/wrote", "a") as file:
        file.write(name + " ")
      yield from whole(self, name)
    scenes.Builder._generate_examples = told
    builder = prepare.prepare(scenes.Builder, data_dir=sys.argv[1], train_size=400,
                              val_size=5, test_size=4, res=24)
    assert builder.info.splits["train"].num_examples == 400
    """
  both = [run(script, tmp_path) for _ in range(2)]
  assert [process.wait(60) for process in both] == [0, 0]
  assert (tmp_path / "wrote").read_text().split() == ["train", "val", "test"]


def test_what_a_killed_run_leaves_is_no_data(tmp_path):
  script = """
    import os, signal, sys
    from vlp_jax.data.builders import prepare, scenes
    whole = scenes.Builder._generate_examples
    def killed(self, name):
      for index, example in whole(self, name):
        if name == "val" and index == 2:
          os.kill(os.getpid(), signal.SIGKILL)
        yield index, example
    scenes.Builder._generate_examples = killed
    prepare.prepare(scenes.Builder, data_dir=sys.argv[1], train_size=12, val_size=5,
                    test_size=4, res=24)
    """
  assert run(script, tmp_path).wait(60) == -signal.SIGKILL
  (folder,) = (tmp_path / "scenes").iterdir()
  assert [f for f in folder.iterdir() if f.name.startswith("incomplete.")]
  assert not (folder / "1.0.0").exists()
  builder = prepare.prepare(scenes.Builder, data_dir=tmp_path, **SMALL)
  assert len(read(builder, "train")) == 12
  assert {f.name for f in folder.iterdir()} == {"1.0.0", ".lock"}


def test_a_failing_run_leaves_nothing(tmp_path, monkeypatch):
  def fails(self, name):
    raise OSError("disk full")
    yield

  with monkeypatch.context() as patch:
    patch.setattr(scenes.Builder, "_generate_examples", fails)
    with pytest.raises(OSError, match="disk full"):
      prepare.prepare(scenes.Builder, data_dir=tmp_path, **SMALL)
  builder = prepare.prepare(scenes.Builder, data_dir=tmp_path, **SMALL)
  assert len(read(builder, "test")) == 4


def test_scenes_say_what_is_wrong(tmp_path):
  with pytest.raises(ValueError, match="size=900"):
    scenes.Builder(data_dir=tmp_path, val_size=900)


# --- Flickr8k -------------------------------------------------------------------------

NAMES = {"train": ["c.jpg", "a.jpg", "d.jpg"], "val": ["b.jpg"], "test": ["e.jpg"]}
EVERY = [name for names in NAMES.values() for name in names]


def jpeg(name):
  """Bytes of a small picture that is not another name's."""
  file = io.BytesIO()
  Image.new("RGB", (9, 7), (ord(name[0]), 40, 90)).save(file, "JPEG")
  return file.getvalue()


def write_texts(folder, caption_file="Flickr8k.token.txt"):
  folder.mkdir(parents=True, exist_ok=True)
  for split, names in NAMES.items():
    (folder / flickr8k.LISTS[split]).write_text("\n".join(names) + "\n")
  # Of a.jpg they stand out of order, as a few do in the official file.
  numbers = {name: range(5) for name in [*EVERY, "unlisted.jpg"]} | {
    "a.jpg": (1, 0, 4, 3, 2)
  }
  (folder / caption_file).write_text(
    "".join(
      f"{name}#{k}\tCaption {k} of {name} .\n"
      for name in numbers
      for k in numbers[name]
    )
  )


def official(root):
  """As the two official archives unpack."""
  write_texts(root / "Flickr8k_text")
  (root / "Flicker8k_Dataset").mkdir()
  for name in EVERY:
    (root / "Flicker8k_Dataset" / name).write_bytes(jpeg(name))


def zipped(root):
  """Lists at the top, images in several zip files, other pictures of some beside."""
  write_texts(root, "captions.tsv")
  (root / "images224").mkdir()
  for split, names in NAMES.items():
    with zipfile.ZipFile(root / "images224" / f"{split}.zip", "w") as archive:
      for name in names:
        archive.writestr(f"pictures/{name}", jpeg(name))
        archive.writestr(f"__MACOSX/pictures/._{name}", b"no picture")
  with zipfile.ZipFile(root / "another_size.zip", "w") as archive:
    archive.writestr("a.jpg", b"another a")


@pytest.fixture(params=[official, zipped])
def folder(request, tmp_path):
  root = tmp_path / "source"
  root.mkdir()
  request.param(root)
  return root


def test_flickr8k_keeps_lists_captions_and_bytes(folder, tmp_path):
  builder = prepare.prepare(
    flickr8k.Builder, data_dir=tmp_path / "data", source_dir=folder
  )
  image_id = 0
  for split, names in NAMES.items():
    examples = read(builder, split)
    assert [example["key"] for example in examples] == names
    for example in examples:
      name = example["key"]
      assert example["image"] == jpeg(name)
      assert example["captions"] == [f"Caption {k} of {name} ." for k in range(5)]
      assert example["image_id"] == image_id
      image_id += 1


def test_flickr8k_is_prepared_anew_when_the_folder_changes(folder, tmp_path):
  def place():
    return flickr8k.Builder(data_dir=tmp_path, source_dir=folder).data_path

  before = place()
  assert place() == before
  captions = next(folder.rglob("*token.txt"), folder / "captions.tsv")
  whole = captions.read_text()
  captions.write_text(whole.replace("Caption 3 of d", "Another of d"))
  assert place() != before
  captions.write_text(whole)
  assert place() == before
  loose = folder / "Flicker8k_Dataset"
  if loose.exists():
    os.utime(loose / "c.jpg", ns=(1, 1))
  else:
    with zipfile.ZipFile(folder / "images224" / "test.zip", "w") as archive:
      archive.writestr("e.jpg", jpeg("x"))
  assert place() != before


def test_flickr8k_leaves_captions_that_are_not_utf8_to_the_reader(folder, tmp_path):
  captions = next(folder.rglob("*token.txt"), folder / "captions.tsv")
  captions.write_bytes(
    captions.read_bytes().replace(b"Caption 0 of c", b"\xff\xfe of c")
  )
  builder = prepare.prepare(
    flickr8k.Builder, data_dir=tmp_path / "data", source_dir=folder
  )
  source = builder.as_data_source(
    "train", decoders={"image": tfds.decode.SkipDecoding()}
  )
  assert source[0]["captions"][0] == b"\xff\xfe of c.jpg ."


def test_flickr8k_says_what_is_missing(folder, tmp_path):
  with pytest.raises(FileNotFoundError, match="source_dir='.*none': no such folder"):
    flickr8k.look(tmp_path / "none")
  (tmp_path / "empty").mkdir()
  with pytest.raises(FileNotFoundError, match="Flickr_8k.trainImages.txt"):
    flickr8k.look(tmp_path / "empty")
  list_file = next(folder.rglob("Flickr_8k.testImages.txt"))
  list_file.write_text("e.jpg\nmissing.jpg\n")
  with pytest.raises(FileNotFoundError, match="image missing.jpg .*5 of 6"):
    flickr8k.look(folder)
  list_file.write_text("e.jpg\na.jpg\n")
  with pytest.raises(ValueError, match="testImages.txt: image a.jpg .* of train"):
    flickr8k.look(folder)
  list_file.write_text("\n")
  with pytest.raises(ValueError, match="testImages.txt names no image"):
    flickr8k.look(folder)
  list_file.unlink()
  with pytest.raises(FileNotFoundError, match="no Flickr_8k.testImages.txt"):
    flickr8k.look(folder)


def test_flickr8k_says_which_caption_is_wrong(folder):
  captions = next(folder.rglob("*token.txt"), folder / "captions.tsv")
  whole = captions.read_text()
  captions.write_text(whole + "a.jpg a caption without number\n")
  with pytest.raises(
    ValueError, match=rf"{captions.name}, line 31: want .*a.jpg a cap"
  ):
    flickr8k.look(folder)
  captions.write_text(whole + "a.jpg#2\tonce more\n")
  with pytest.raises(ValueError, match="line 31: a second caption a.jpg#2"):
    flickr8k.look(folder)
  captions.write_text("".join(x for x in whole.splitlines(True) if x[:2] != "e."))
  with pytest.raises(ValueError, match="image e.jpg .* no caption"):
    flickr8k.look(folder)
  captions.unlink()
  with pytest.raises(FileNotFoundError, match="no Flickr8k.token.txt or captions.tsv"):
    flickr8k.look(folder)


def test_flickr8k_without_images(tmp_path):
  write_texts(tmp_path)
  with pytest.raises(FileNotFoundError, match="none of the 5 listed images"):
    flickr8k.look(tmp_path)
  (tmp_path / "images.zip").write_bytes(b"no archive")
  with pytest.raises(ValueError, match="images.zip is not a zip file"):
    flickr8k.look(tmp_path)
