"""Sources: tables and folders of one's own, TFDS data sets, and what they say."""

import csv
import io
import json
import threading

import numpy as np
from PIL import Image
import pytest

from tests.data import pictures
from vlp_jax.data import evaluation
from vlp_jax.data import pipeline
from vlp_jax.data.sources import scenes
from vlp_jax.data.sources import table
from vlp_jax.data.sources import tfds

PP = "decode|resize(8)"
TOKENIZER = pictures.Tokenizer()

ROWS = (
  ("a.png", "A dog."),
  ("sub/b.jpg", "Ein Kätzchen, grau"),
  ("a.png", 'Said "two".'),
)
WANT = [("a.png", ["A dog.", 'Said "two".']), ("sub/b.jpg", ["Ein Kätzchen, grau"])]


@pytest.fixture
def folder(tmp_path):
  """Two pictures, sub/b.jpg and a.png."""
  (tmp_path / "sub").mkdir()
  (tmp_path / "a.png").write_bytes(pictures.encoded(pictures.pixels(seed=1)))
  (tmp_path / "sub/b.jpg").write_bytes(pictures.encoded(pictures.pixels(), "JPEG"))
  return tmp_path


def as_jsonl(rows):
  return "\n".join(json.dumps(dict(image=i, caption=c)) for i, c in rows) + "\n\n"


def as_json(rows):
  return json.dumps([dict(image=i, caption=c) for i, c in rows])


def as_csv(rows):
  text = io.StringIO()
  csv.writer(text).writerows([("image", "caption"), *rows])
  return text.getvalue()


def as_tsv(rows):
  return "".join("\t".join(row) + "\n" for row in [("image", "caption"), *rows])


FORMATS = dict(jsonl=as_jsonl, json=as_json, csv=as_csv, tsv=as_tsv)


def write(folder, text, name):
  path = folder / name
  path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
  return str(path)


def content(source, folder):
  """[(image path below `folder`, captions)], and checks the rest of what is read."""
  read = source.read(np.arange(len(source)))
  out = []
  for index, raw in enumerate(read):
    assert raw["image_id"] == index
    with open(raw["key"], "rb") as file:
      assert raw["image"] == file.read()
    captions = [c.decode() if isinstance(c, bytes) else c for c in raw["captions"]]
    out.append((str(raw["key"]).removeprefix(f"{folder}/"), captions))
  return out


def ids(source, count, **fields):
  made = pipeline.train_batches(source, PP, TOKENIZER, batch_size=2, seed=0, **fields)
  return np.concatenate([next(made)["image_id"] for _ in range(count)]), made.bad


# --- Tables ---------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_rows_of_one_image_are_joined(folder, suffix):
  source = table.Source(write(folder, FORMATS[suffix](ROWS), f"pairs.{suffix}"))
  assert len(source) == 2
  assert content(source, folder) == WANT
  assert source.captions([1, 0]) == [*WANT[1][1], *WANT[0][1]]


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_windows_writes(folder, suffix):
  text = FORMATS[suffix](ROWS).replace("\r\n", "\n").replace("\n", "\r\n")
  source = table.Source(write(folder, "\ufeff" + text, f"pairs.{suffix}"))
  assert content(source, folder) == WANT


def test_lists_of_captions_ids_and_a_root(folder):
  rows = [
    dict(image="a.png", captions=["one", "two"], image_id="x", split="train"),
    dict(image="sub/b.jpg", caption=["three"], image_id="y", split="val"),
    dict(image="a.png", caption="four", image_id="x", split="train"),
  ]
  (folder / "tables").mkdir()
  path = write(folder, json.dumps(rows), "tables/pairs.json")
  source = table.Source(path, root=str(folder))
  want = [("a.png", ["one", "two", "four"]), ("sub/b.jpg", ["three"])]
  assert content(source, folder) == want
  assert content(table.Source(path, str(folder), split="val"), folder) == want[1:]
  with pytest.raises(ValueError, match=r"split='test'.*pairs.json has train, val"):
    table.Source(path, str(folder), split="test")
  with pytest.raises(FileNotFoundError, match=r"none of its first 2 images.*root"):
    table.Source(path)
  with pytest.raises(FileNotFoundError, match=r"source.root=.*nowhere"):
    table.Source(path, root=str(folder / "nowhere"))


def test_absolute_paths(folder):
  rows = [(str(folder / "a.png"), "A dog.")]
  (folder / "tables").mkdir()
  source = table.Source(write(folder, as_jsonl(rows), "tables/pairs.jsonl"))
  assert content(source, folder) == [("a.png", ["A dog."])]


def test_a_folder_with_texts(folder):
  write(folder, "A dog.\n\nTwo dogs.\r\n", "a.txt")
  write(folder, "Ein Kätzchen", "sub/b.txt")
  source = table.Source(str(folder))
  want = [("a.png", ["A dog.", "Two dogs."]), ("sub/b.jpg", ["Ein Kätzchen"])]
  assert content(source, folder) == want
  assert source.captions(range(2)) == ["A dog.", "Two dogs.", "Ein Kätzchen"]
  made, _ = ids(source, 2)
  assert set(made) == {0, 1}


def test_a_folder_where_a_text_lacks(folder):
  write(folder, "A dog.", "a.txt")
  with pytest.raises(FileNotFoundError, match=r"1 of 2 images .*no \.txt .*sub/b\.jpg"):
    table.Source(str(folder))


def lines(*rows):
  """Lines of a .jsonl."""
  return "\n".join(json.dumps(row) for row in rows)


GOOD = dict(image="a.png", caption="x")
OTHER = dict(image="b.png", caption="x", image_id=1)


@pytest.mark.parametrize(
  "name, text, parts",
  [
    # A table, and what is told of it besides its name.
    ("a.jsonl", lines(GOOD) + "\n\n" + lines({"image": "a"}), ("line 3", '"caption"')),
    ("a.jsonl", lines({"imgae": "a.png", "caption": "x"}), ('"image"', "imgae")),
    ("a.jsonl", '{"image": "a.png",', ("line 1", "no JSON")),
    ("a.jsonl", lines(["a.png", "x"]), ("line 1", "wants fields")),
    ("a.jsonl", lines(GOOD, GOOD | {"caption": 5}), ("line 2", '"caption"', "5")),
    ("a.jsonl", lines({"image": "a.png", "captions": [5]}), ("line 1", "[5]")),
    ("a.jsonl", lines(GOOD | {"image": ["a"]}), ("line 1", '"image"')),
    ("a.jsonl", lines(GOOD | {"image_id": 1}, OTHER), ("line 2", "id 1", "b.png")),
    ("a.json", lines(GOOD), ("wants a list",)),
    ("a.json", lines([GOOD, 3]), ("row 2", "wants fields")),
    ("a.json", "[", ("the file", "no JSON")),
    ("a.csv", "image,text\na.png,x\n", ("line 2", '"caption"', "image, text")),
    ("a.tsv", "image,caption\na.png,x\n", ("line 2", '"image"', "image,caption")),
    ("a.csv", f'image,caption\na.png,"{"x" * 200_000}"\n', ("a.csv, line", "limit")),
    ("a.parquet", "PAR1", (".jsonl", "folder")),
    ("a.jsonl", "\n", ("is empty",)),
    ("a.json", "[]", ("is empty",)),
    ("a.csv", "image,caption\n", ("is empty",)),
    ("a.tsv", "", ("is empty",)),
  ],
)
def test_mistakes_in_a_table_are_placed(folder, name, text, parts):
  path = write(folder, text, name)
  with pytest.raises(ValueError) as caught:
    table.Source(path)
  assert path in str(caught.value)
  for part in parts:
    assert part in str(caught.value)


def test_nothing_there(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"source.path=.*pairs.jsonl: no such"):
    table.Source(str(tmp_path / "pairs.jsonl"))
  with pytest.raises(ValueError, match="is empty: no image"):
    table.Source(str(tmp_path))


def test_a_missing_image_is_a_broken_record(folder, caplog):
  rows = [*ROWS, ("gone.jpg", "A cat."), ("sub", "A folder.")]
  source = table.Source(write(folder, as_jsonl(rows), "pairs.jsonl"))
  assert len(source) == 4
  made, bad = ids(source, 4, max_bad=0.9)
  assert set(made) == {0, 1}
  assert set(bad) == {"file is missing", "file cannot be read"}
  assert f"{folder}/gone.jpg" in caplog.text
  with pytest.raises(ValueError, match=r"evaluation: .*gone\.jpg.*missing"):
    list(evaluation.eval_images(source, PP, batch_size=2))


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_caption_that_is_not_utf8_is_a_broken_record(folder, suffix):
  text = FORMATS[suffix]([("a.png", "caf?"), ("sub/b.jpg", "good")])
  path = write(folder, text.encode().replace(b"caf?", b"caf\xe9"), f"pairs.{suffix}")
  source = table.Source(path)
  made, bad = ids(source, 2, max_bad=0.9)
  assert set(made) == {1}
  assert set(bad) == {"caption is not UTF-8"}
  # A tokenizer may be trained on them.
  assert [text.encode() for text in source.captions([0, 1])] == [b"caf?", b"good"]


def test_empty_captions_are_broken_records(folder):
  text = "image,caption\na.png,\nsub/b.jpg,good\n"
  made, bad = ids(table.Source(write(folder, text, "pairs.csv")), 2, max_bad=0.9)
  assert set(made) == {1} and set(bad) == {"empty caption"}


# --- TFDS -----------------------------------------------------------------------------

SMALL = dict(train_size=6, val_size=4, test_size=4, res=24)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
  return dict(data_dir=str(tmp_path_factory.mktemp("tfds")), builder=SMALL)


def test_scenes_from_disk_are_those_that_are_drawn(drawn):
  source = tfds.Source("scenes", split="val", **drawn)
  want = scenes.Source("val", size=4, res=24)
  assert len(source) == 4
  assert source.read([2, 0, 2]) == [
    raw | {"captions": [raw["captions"][0].encode()]} for raw in want.read([2, 0, 2])
  ]
  assert source.captions(range(4)) == want.captions(range(4))
  made, bad = ids(tfds.Source("scenes", **drawn), 3)
  assert len(made) == 6 and not bad


def test_a_slice_of_a_split(drawn):
  assert len(tfds.Source("scenes", split="train[:50%]", **drawn)) == 3
  assert len(tfds.Source("scenes", split="train+val", **drawn)) == 10
  with pytest.raises(ValueError, match=r"train\[:0\]"):
    tfds.Source("scenes", split="train[:0]", **drawn)


def test_read_by_threads_at_once(drawn):
  source = tfds.Source("scenes", **drawn)
  want, wrong = source.read(range(6)), []

  def read():
    for _ in range(20):
      if source.read(range(6)) != want:
        wrong.append(1)

  threads = [threading.Thread(target=read) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong


def test_wrong_names(drawn, tmp_path):
  with pytest.raises(ValueError, match=r"split='dev': scenes has train, val, test"):
    tfds.Source("scenes", split="dev", **drawn)
  with pytest.raises(ValueError, match=r"source.name='sceens'.*flickr8k, scenes"):
    tfds.Source("sceens", data_dir=str(tmp_path))
  with pytest.raises(ValueError, match=r"source.builder of scenes: .*'rse'"):
    tfds.Source("scenes", data_dir=str(tmp_path), builder=dict(rse=24))
  with pytest.raises(ValueError, match=r"source.image='imag'.*mean 'image'.*captions"):
    tfds.Source("scenes", image="imag", **drawn)
  for name in ("no_such_module:Builder", "vlp_jax.data.builders.scenes:Bulider"):
    with pytest.raises(ValueError, match=f"source.name='{name}'"):
      tfds.Source(name, data_dir=str(tmp_path))


def test_a_builder_of_ones_own(drawn):
  name = "vlp_jax.data.builders.scenes:Builder"
  assert tfds.Source(name, **drawn).read([0]) == tfds.Source("scenes", **drawn).read(
    [0]
  )


@pytest.fixture
def flickr8k(tmp_path):
  """A folder of the official layout with six made pictures."""
  root = tmp_path / "flickr8k"
  (root / "Flicker8k_Dataset").mkdir(parents=True)
  captions = []
  lists = dict(train=range(4), dev=[4], test=[5])
  for split, members in lists.items():
    for i in members:
      file = root / f"Flicker8k_Dataset/{i}.jpg"
      Image.fromarray(pictures.pixels(seed=i)).save(file)
      captions += [f"{i}.jpg#{k}\tcaption {k} of {i} .\n" for k in range(5)]
    names = "".join(f"{i}.jpg\n" for i in members)
    (root / f"Flickr_8k.{split}Images.txt").write_text(names)
  (root / "Flickr8k.token.txt").write_text("".join(captions))
  return root


def test_flickr8k(flickr8k, tmp_path):
  fields = dict(dir=str(flickr8k), data_dir=str(tmp_path / "tfds"))
  train = tfds.Source("flickr8k", "train", **fields)
  test = tfds.Source("flickr8k", "test", **fields)
  assert (len(train), len(test)) == (4, 1)
  (raw,) = test.read([0])
  assert raw["key"] == "5.jpg" and raw["image_id"] == 5
  assert raw["image"] == (flickr8k / "Flicker8k_Dataset/5.jpg").read_bytes()
  assert test.captions([0]) == [f"caption {k} of 5 ." for k in range(5)]
  made, bad = ids(train, 2)
  assert sorted(made) == [0, 1, 2, 3] and not bad


def test_flickr8k_without_its_folder(tmp_path):
  fields = dict(data_dir=str(tmp_path / "tfds"))
  with pytest.raises(FileNotFoundError, match=r"nowhere'?: no such folder"):
    tfds.Source("flickr8k", dir=str(tmp_path / "nowhere"), **fields)
  with pytest.raises(ValueError, match=r"flickr8k: .*source_dir.*data\.source\.dir=…"):
    tfds.Source("flickr8k", **fields)
