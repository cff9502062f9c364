"""The report: its tables, curves, page and pictures, on made-up results."""

import html.parser
import json
import pathlib
import types

import numpy as np
import pytest

from tests import tiny
from tests.evaluators import fakes
from vlp_jax import report
from vlp_jax.data import regions
from vlp_jax.data.sources import scenes
from vlp_jax.evaluators import retrieval
from vlp_jax.explain import attention
from vlp_jax.report import curves
from vlp_jax.report import maps
from vlp_jax.report import pictures

RESULTS = {
  "val": {
    **{
      f"itc/{w}_r{k}": v
      for w in ("i2t", "t2i")
      for k, v in ((1, 61.2), (5, 90), (10, 97))
    },
    "itc/mean": 82.7,
    **{f"itm/{w}_r{k}": 100.0 for w in ("i2t", "t2i") for k in (1, 5, 10)},
    "itm/mean": 100.0,
    **{f"chance/{w}_r{k}": 0.2 * k for w in ("i2t", "t2i") for k in (1, 5, 10)},
  },
  "match": {
    "accuracy": 95.0,
    "accuracy_hard": 80.0,
    "true": 92.0,
    "random": 98.0,
    "hard": 68.0,
  },
  "words": {
    "accuracy": 88.0,
    "accuracy_blank": 41.5,
    "gain": 46.5,
    "colour/accuracy": 99.0,
    "colour/accuracy_blank": 20.0,
    "colour/gain": 79.0,
  },
  "held_out": {"loss": 1.23456},
}
SHADES = (10, 40, 80, 90, 100, 140, 170, 200, 230)


def log(path, steps=120):
  rng = np.random.default_rng(0)
  with open(path, "w") as file:
    for step in range(1, steps + 1):
      row = {"step": step, "time": "now"}
      for name, end in (("loss", 2.0), ("itc", 0.5), ("itm", 0.2), ("mlm", 1.1)):
        row[name] = end + 4 * np.exp(-step / 20) + 0.1 * rng.standard_normal()
      if step % 40 == 0:
        row["held_out/itc"] = 0.7 + 4 * np.exp(-step / 20)
      file.write(json.dumps(row) + "\n")
  return path


def found(shades=SHADES, captions=2):
  source = fakes.Source(shades, captions=captions)
  made = retrieval.Evaluator(rerank=4)
  made.setup(
    pretrainer=fakes.pretrainer(),
    source=source,
    tokenizer=fakes.Tokenizer(),
    pp=fakes.PP,
    mesh=None,
    batch_size=4,
  )
  made(fakes.variables(wrong=13.0))
  return made.last, report.reader(source)


class Page(html.parser.HTMLParser):
  """Files that a page names, and whether its tags close."""

  def __init__(self, path):
    super().__init__()
    self.files, self.open, self.classes = [], [], []
    self.feed(pathlib.Path(path).read_text("utf-8"))

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.files += [attrs[k] for k in ("src", "href") if k in attrs]
    self.classes += attrs.get("class", "").split()
    if tag not in ("meta", "img"):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


def test_table_for_the_terminal():
  text = report.table(RESULTS)
  assert "\t" not in text and max(map(len, text.split("\n"))) <= 88
  lines = text.split("\n")
  header = next(line for line in lines if line.count("R@10") == 2)
  itc = next(line for line in lines if line.startswith("ITC alone"))
  chance = next(line for line in lines if line.startswith("chance"))
  ends = [header.index("R@1") + 3, header.rindex("R@10") + 4, len(header)]
  assert itc.split() == ["ITC", "alone", *2 * ["61.2", "90.0", "97.0"], "82.7"]
  assert [itc[e - 4 : e] for e in ends] == ["61.2", "97.0", "82.7"]
  assert chance.split()[1:4] == ["0.20", "1.0", "2.0"]
  assert "image → text" in text and "+46.5" in text and "+79.0" in text
  assert "1.235" in text and "accuracy_blank" not in text


def test_table_without_reranking_has_no_row_for_it():
  values = {k: v for k, v in RESULTS["val"].items() if not k.startswith("itm/")}
  assert "ITM" not in report.table({"val": values})


def test_the_page_names_only_files_that_are_there(tmp_path):
  rng = np.random.default_rng(0)
  maps = [
    report.WordMaps(
      image=rng.integers(0, 255, (16, 16, 3)).astype(np.uint8),
      caption="a <b> & c",
      words=("a", "<b>", "&", "c"),
      maps=rng.random((4, 2, 2)),
    )
  ]
  path = report.write(
    tmp_path,
    title="Quickstart <small>",
    results=RESULTS,
    facts={"Steps": "120", "Machine": "2 CPU cores"},
    config="model.image.width = 32\nname = <x>",
    log=log(tmp_path / "metrics.jsonl"),
    objectives=("itc", "itm", "mlm"),
    found={"val": found()},
    maps=maps,
  )
  page = Page(path)
  text = path.read_text("utf-8")
  assert not page.open and path == tmp_path / "report.html"
  assert len(page.files) > 20
  for name in page.files:
    assert name.startswith("report/") and (tmp_path / name).stat().st_size > 0
  assert "Quickstart &lt;small&gt;" in text and "<small>" not in text
  assert "a &lt;b&gt; &amp; c" in text and "name = &lt;x&gt;" in text
  # Every query has one right image; ITM found the first of each.
  assert page.classes.count("shot") == 6 * 5 + 6
  shown = (tmp_path / "report").iterdir()
  assert {p.name for p in shown} >= {"losses.png", "config.txt", "map_0_4.jpg"}


def test_a_second_report_leaves_nothing_of_the_first(tmp_path):
  report.write(tmp_path, title="a", results={}, config="x = 1")
  report.write(tmp_path, title="b", results={})
  assert not list((tmp_path / "report").iterdir())
  assert sorted(p.name for p in tmp_path.iterdir()) == ["report", "report.html"]


def test_fewer_images_than_answers(tmp_path):
  path = report.write(
    tmp_path, title="few", results={}, found={"test set": found((10, 200), captions=1)}
  )
  assert Page(path).classes.count("shot") == 2 * 2 + 2


def test_the_log_counts_a_step_as_logged_last_and_survives_a_kill(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text(
    '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.5, "note": "x"}\n{"step": 3, "lo'
    '\n{"step": 2, "loss": 2.0, "lr": NaN}\n{"step": 4}\n'
  )
  got = curves.read_log(path)
  np.testing.assert_array_equal(got["loss"][0], [1, 2])
  np.testing.assert_array_equal(got["loss"][1], [3.0, 2.0])
  assert set(got) == {"loss", "lr"}


def test_no_log_and_an_empty_one(tmp_path):
  with pytest.raises(FileNotFoundError, match="no log .*metrics.jsonl"):
    curves.read_log(tmp_path / "metrics.jsonl")
  (tmp_path / "metrics.jsonl").write_text("")
  path = report.write(tmp_path, title="x", results={}, log=tmp_path / "metrics.jsonl")
  assert "has none yet" in path.read_text()


def test_curves_of_one_point_and_of_nan(tmp_path):
  log = {
    "loss": (np.array([1]), np.array([2.0])),
    "itc": (np.arange(3), np.full(3, np.nan)),
  }
  assert curves.plot_losses(log, tmp_path / "x.png", objectives=["itc", "itm"]) == [
    "loss",
    "itc",
  ]


def test_running_mean():
  values = np.arange(100.0)
  got = curves._smooth(values)
  np.testing.assert_allclose(got[2:-2], values[2:-2])
  np.testing.assert_allclose(got[0], values[:3].mean())


def test_pictures_are_drawn_or_photographed(tmp_path):
  small = pictures.save(np.zeros((64, 64, 3), np.uint8), tmp_path / "a")
  large = pictures.save(np.zeros((300, 500, 3), np.uint8), tmp_path / "b")
  assert small.name == "a.png" and large.name == "b.jpg"
  with pictures.Image.open(small) as a, pictures.Image.open(large) as b:
    assert a.size == (192, 192) and b.size == (224, 134)


def test_word_maps_join_pieces(monkeypatch):
  # Patch p of word position l has weight l + p: the class token has none.
  def fake(pretrainer, params, image, ids, mask, *, objective):
    weights = np.arange(10)[:, None] + np.arange(-1.0, 4)[None]
    weights = np.broadcast_to(weights, (1, len(ids), 2, 10, 5))
    return weights, np.ones_like(weights)

  monkeypatch.setattr(attention, "cross_attention", fake)
  tokenizer = types.SimpleNamespace(
    vocab=tiny.VOCAB, decode=lambda ids: "+".join(map(str, ids))
  )
  batch = tiny.batch(4)
  batch["text"][1] = [tiny.VOCAB.cls, 7, 8, 50, 9, 0, 0, 0, 0, 0]
  batch["valid"] = np.array([False, True, True, False])
  got = maps.word_maps(None, None, batch, tokenizer, count=4)
  assert len(got) == 2 and got[0].words == ("7", "8+50", "9")
  assert got[0].caption == "7 8+50 9" and got[0].maps.shape == (3, 2, 2)
  np.testing.assert_allclose(got[0].maps[1], [[2.5, 3.5], [4.5, 5.5]])
  np.testing.assert_array_equal(got[0].image, batch["image"][1])


def test_regions_are_drawn_as_their_boxes():
  source = scenes.Source(size=4, res=48, regions=5)
  picture = pictures.reader(source)(1)
  assert picture.shape == (pictures.SIDE, pictures.SIDE, 3)
  found = regions.load(source.read(np.array([1]))[0]["image"])
  left, top, _, _ = (found["boxes"][0] / 48 * (pictures.SIDE - 1)).astype(int)
  # Of a thing, which is sure, and beside it the page.
  assert picture[top + 2, left : left + 2].min() < 60 and picture.max() == 255
