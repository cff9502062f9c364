"""Config files: reading, overriding, saving."""

import dataclasses
import pathlib
import shutil
import sys

import ml_collections
import pytest

from vlp_jax import config as config_lib
from vlp_jax import config_file

SMALL = pathlib.Path(__file__).parent / "configs_for_tests" / "small.py"


@pytest.fixture
def file(tmp_path):
  """A config in a folder of its own: `configs` is that of the repository."""
  return str(shutil.copy(SMALL, tmp_path / "mine.py"))


def test_reads_a_file_and_its_argument(file):
  assert config_file.load(file).total == 30
  assert config_file.load(f"{file}:short").total == "3 epochs"


def test_imports_the_configs_folder_that_the_file_is_in(tmp_path):
  folder = tmp_path / "configs" / "finetune"
  folder.mkdir(parents=True)
  (tmp_path / "configs" / "parts.py").write_text("NUMBER = 7\n")
  (folder / "near.py").write_text("NUMBER = 8\n")
  (folder / "vqa.py").write_text(
    "import near\nfrom configs import parts\n"
    "def get_config():\n  return dict(a=parts.NUMBER, b=near.NUMBER)\n"
  )
  before = {name for name in sys.modules if name.startswith("configs")}
  assert config_file.load(str(folder / "vqa.py")).to_dict() == dict(a=7, b=8)
  assert {name for name in sys.modules if name.startswith("configs")} == before


def test_siblings_of_one_file_are_not_those_of_another(tmp_path):
  """Also packages; what a file imports from elsewhere stays."""
  for name in ("one", "two"):
    folder = tmp_path / name
    (folder / "a_package").mkdir(parents=True)
    (folder / "near.py").write_text(f"NAME = '{name}'\n")
    (folder / "a_package" / "__init__.py").write_text("")
    (folder / "a_package" / "deep.py").write_text(f"NAME = '{name}'\n")
    (folder / "mine.py").write_text(
      "import near\nfrom a_package import deep\n"
      "def get_config():\n  return dict(a=near.NAME, b=deep.NAME)\n"
    )
  before = set(sys.modules)
  for name in ("one", "two"):
    config = config_file.load(str(tmp_path / name / "mine.py"))
    assert config.to_dict() == dict(a=name, b=name)
  assert set(sys.modules) == before


def test_what_a_file_imports_from_elsewhere_stays(tmp_path, monkeypatch):
  """From a folder on the path, though it be its own; packages are not loaded twice."""
  (tmp_path / "site").mkdir()
  (tmp_path / "site" / "far.py").write_text("NUMBER = 8\n")
  (tmp_path / "mine.py").write_text(
    "import far\ndef get_config():\n  return dict(a=far.NUMBER)\n"
  )
  monkeypatch.syspath_prepend(tmp_path / "site")
  config_file.load(str(tmp_path / "mine.py"))
  assert sys.modules.pop("far").NUMBER == 8
  (tmp_path / "near.py").write_text("NUMBER = 9\n")
  (tmp_path / "mine.py").write_text(
    "import near\ndef get_config():\n  return dict(a=near.NUMBER)\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  config_file.load(str(tmp_path / "mine.py"))
  assert sys.modules.pop("near").NUMBER == 9


def test_overrides(file):
  config = config_file.load(
    file,
    [
      "--config.batch_size=32",
      "--config.total=2 epochs",
      "--config.optim.lr=1e-3",
      "--config.log.every=7",
      "--config.model.image_mean=(0.5, 0.5, 0.5)",
      "--config.model.fusion=None",
      "--config.data.source.split=val",
      "--config.ema_decay=0.99",
      "--config.data.pp=decode|resize(64)",
    ],
  )
  assert config.batch_size == 32
  assert config.total == "2 epochs"
  assert config.optim.lr == 1e-3
  assert config.log.every == 7  # a dict that the file does not have
  assert config.model.image_mean == (0.5, 0.5, 0.5)
  assert config.model.fusion is None
  assert config.data.source.split == "val"
  assert config.data.pp == "decode|resize(64)"
  # What was None gets fields again.
  again = config_file.load(
    file, ["--config.model.fusion=None", "--config.model.fusion.depth=3"]
  )
  assert again.model.fusion.depth == 3


@pytest.mark.parametrize(
  ("item", "message"),
  [
    ("--config.seed", "wants --config.key=value"),
    ("--config.=3", "wants --config.key=value"),
    ("--config.a..b=3", "wants --config.key=value"),
    ("--config.batch_size.x=3", "batch_size is 16, which has no fields"),
    ("--config.evals=[{}]", "a dict within a list: give it a name"),
    ("--config.data.pp=b'raw'", "wants plain data"),
  ],
)
def test_bad_overrides(file, item, message):
  with pytest.raises(ValueError, match=message):
    config_file.load(file, [item])


def test_missing_file_names_the_nearest(tmp_path):
  (tmp_path / "quickstart.py").write_text("")
  with pytest.raises(FileNotFoundError) as error:
    config_file.load(str(tmp_path / "quikstart.py"))
  assert f"did you mean {tmp_path / 'quickstart.py'}?" in str(error.value)
  with pytest.raises(FileNotFoundError, match="no such file: nowhere/at/all.py"):
    config_file.load("nowhere/at/all.py:arg")


@pytest.mark.parametrize(
  ("text", "spec", "message"),
  [
    ("x = 1", "", "has no function get_config"),
    ("def get_config(): return {}", ":big", "takes no argument, got 'big'"),
    (
      "def get_config(arg=''): return dict(tiny=arg == 'tiny')",
      ":tinny",
      "'tinny' changes nothing",
    ),
    ("def get_config(): return 3", "", "returned 3, wants a ConfigDict"),
    ("def get_config(): return dict(f=lambda: 1)", "", r"f: got .* wants plain data"),
    ("def get_config(): return dict(a=[dict(b=1)])", "", "a dict within a list"),
    ("def get_config(): return {'a.b': 1}", "", "'a.b' is no name for a key"),
  ],
)
def test_files_that_are_no_configs(tmp_path, text, spec, message):
  path = tmp_path / "odd.py"
  path.write_text(text)
  with pytest.raises(ValueError, match=message):
    config_file.load(f"{path}{spec}")


def test_saved_configs_come_back(file, tmp_path):
  config = config_file.load(file, ["--config.model.image_mean=(0.5, (1, 'ä'), [2])"])
  text = config_file.to_json(config)
  assert config_file.from_json(text) == config
  assert config_file.from_json(text).model.image_mean == (0.5, (1, "ä"), [2])
  saved = tmp_path / "config.json"
  whole = dataclasses.asdict(config_lib.run(config))
  saved.write_text(config_file.to_json(whole), "utf-8")
  loaded = config_file.load(str(saved), ["--config.batch_size=8"])
  assert loaded.batch_size == 8
  assert config_lib.run(config_file.load(str(saved))) == config_lib.run(config)
  with pytest.raises(ValueError, match="not a saved config"):
    config_file.from_json("{")


def test_flatten_is_sorted_text():
  config = ml_collections.ConfigDict(dict(b=dict(c=(1, 2), a="x"), a=None, d={}))
  assert config_file.flatten(config) == [
    "a = None",
    "b.a = 'x'",
    "b.c = (1, 2)",
    "d = {}",
  ]
