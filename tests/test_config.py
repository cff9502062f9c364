"""Configs: reading, overriding, checking, durations, saving."""

import dataclasses
import pathlib
import subprocess
import sys
import textwrap
from typing import Any, Literal

import flax.linen as nn
import ml_collections
import pytest

from vlp_jax import config as config_lib
from vlp_jax import schema

FILE = """
  import ml_collections
  from configs import parts

  def get_config(arg=""):
    c = ml_collections.ConfigDict()
    c.batch_size = 16
    c.total = "3 epochs" if arg == "short" else 30
    c.tokenizer = dict(type="wordpiece", path="vocab.txt", length=9)
    c.model = dict(
      image=parts.size("tiny", type="vit", patch=8, res=32),
      text=parts.size("tiny", type="text"),
      fusion=dict(type="cross_attention", depth=2),
    )
    c.objectives = dict(itc=dict(queue=64), itm=dict(weight=2.0))
    c.data = dict(source=dict(type="scenes"), pp="decode")
    c.optim = dict(lr=1e-4)
    c.evals = dict(
      val=dict(type="retrieval", every="1 epoch", data=dict(source=dict(type="scenes")))
    )
    return c
"""


@pytest.fixture
def file(tmp_path):
  """A config in a folder of its own: `configs` is that of the repository."""
  path = tmp_path / "mine.py"
  path.write_text(textwrap.dedent(FILE))
  return str(path)


def test_reads_a_file_and_its_argument(file):
  assert config_lib.load(file).total == 30
  assert config_lib.load(f"{file}:short").total == "3 epochs"


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
  assert config_lib.load(str(folder / "vqa.py")).to_dict() == dict(a=7, b=8)
  assert {name for name in sys.modules if name.startswith("configs")} == before


def test_overrides(file):
  config = config_lib.load(
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
  again = config_lib.load(
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
    config_lib.load(file, [item])


def test_missing_file_names_the_nearest(tmp_path):
  (tmp_path / "quickstart.py").write_text("")
  with pytest.raises(FileNotFoundError) as error:
    config_lib.load(str(tmp_path / "quikstart.py"))
  assert f"did you mean {tmp_path / 'quickstart.py'}?" in str(error.value)
  with pytest.raises(FileNotFoundError, match="no such file: nowhere/at/all.py"):
    config_lib.load("nowhere/at/all.py:arg")


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
    config_lib.load(f"{path}{spec}")


def test_run_has_the_defaults_and_leaves_out_what_is_none(file):
  run = config_lib.run(config_lib.load(file, ["--config.objectives.itm=None"]))
  assert run.seed == 0
  assert run.log == config_lib.Log()
  assert run.data.max_bad == 0.01
  assert list(run.objectives) == ["itc"]
  assert type(run.model["image"]) is dict
  config_lib.check(run)


@pytest.mark.parametrize(
  ("override", "message"),
  [
    (
      "modle.x=1",
      "config: modle: no such field of vlp_jax/config.py Run; did you mean",
    ),
    (
      "data.max_bda=1",
      "config: data.max_bda: no such field .* did you mean 'max_bad'?",
    ),
    ("batch_size=many", r"batch_size: wrong type: got 'many' \(str\), wants int"),
    ("batch_size=True", r"batch_size: wrong type: got True \(bool\), wants int"),
    ("batch_size=0", "batch_size=0: wants 1 or more"),
    ("ema_decay=2", "ema_decay=2: wants between 0 and 1"),
    ("total=3 weeks", "total: wrong type: got '3 weeks' .* wants a duration"),
    ("data=None", r"data: wrong type: got None \(NoneType\), wants dict"),
    ("checkpoint.keep=0", "checkpoint.keep=0: wants 1 or more"),
    ("log=3", "log: wrong type: got 3"),
    (
      "objectives.itc.quue=3",
      "config: objectives.itc.quue: no such field of vlp_jax/objectives/itc.py"
      r" Objective; did you mean 'queue'\? \(fields: loss, bias, queue",
    ),
    (
      "objectives.itc.queue=abc",
      r"config: objectives.itc.queue: wrong type: got 'abc' \(str\), wants int",
    ),
    (
      "objectives.itc.loss=sofmax",
      "wrong value: got 'sofmax' .* 'softmax' or 'sigmoid'; did you mean 'softmax'",
    ),
    ("objectives.itc.distill_ramp=soon", "distill_ramp: wrong .* wants a duration"),
    ("objectives.itx.weight=1", r"type='itx': no such file .* did you mean 'it[cm]'\?"),
    (
      "model.image.type=vlm",
      r"type='vlm': .* with a class Encoder. \(there are: .*vit",
    ),
    ("model.embed_dmi=3", "did you mean 'embed_dim'"),
    ("model.image.name=x", "model.image.name: no such field"),
    ("model.image.widht=3", "did you mean 'width'"),
    ("model.text=3", "model.text: wrong type: got 3"),
    ("objectives.itc.weight=abc", "objectives.itc.weight: wrong type: got 'abc'"),
    ("evals.val.every=often", "evals.val.every: wrong type: .* wants a duration"),
    ("model.fusion.type=None", "model.fusion.type is missing: name a file of"),
    ("tokenizer.type=word_piece", "did you mean 'wordpiece'"),
    ("data.source.type=no.such:Source", "no module no: is its folder on PYTHONPATH"),
    ("data.source.type=json:Source", "json has no 'Source'"),
    ("evals.val.rernk=3", "did you mean 'rerank'"),
    ("evals.val.data.source.splt=x", "did you mean 'split'"),
    ("optim.learning_rate=1", "no such field of vlp_jax/training/optim.py"),
    ("optim.type=adamw", "config: optim.type: no such field"),
    ("sharding.mehs=1", "did you mean 'mesh'"),
  ],
)
def test_errors_name_field_file_and_way_out(file, override, message):
  with pytest.raises(ValueError, match=message):
    config_lib.check(config_lib.run(config_lib.load(file, [f"--config.{override}"])))


def test_missing_fields(file):
  config = config_lib.load(file)
  del config.model.image.patch
  with pytest.raises(
    ValueError, match="model.image.patch is missing: .*vit.py Encoder wants int"
  ):
    config_lib.check(config_lib.run(config))
  del config.batch_size
  with pytest.raises(ValueError, match="config: batch_size is missing"):
    config_lib.run(config)


@dataclasses.dataclass
class Inner:
  size: int = 1


@dataclasses.dataclass
class Outer:
  a: int
  b: float = 0.0
  c: bool = False
  d: str | None = None
  e: tuple[float, ...] = ()
  f: Literal["x", "y"] | None = "x"
  g: dict[str, int] = dataclasses.field(default_factory=dict)
  h: schema.Duration | None = None
  i: Inner | None = None
  j: tuple[int, str] = (1, "a")
  k: Any = None
  hidden: int = dataclasses.field(default=0, metadata={"internal": True})


GOOD = [
  dict(b=1),
  dict(b=1.5, c=True),
  dict(d=None),
  dict(d="x"),
  dict(e=(1, 2.0)),
  dict(f=None),
  dict(f="y"),
  dict(g={"x": 1}),
  dict(h="2 epochs"),
  dict(h=None),
  dict(i=dict(size=2)),
  dict(i=None),
  dict(j=(2, "b")),
  dict(k=(object, "anything")),
]
BAD = [
  (dict(a=1.0), "a: wrong type"),
  (dict(a=None), "a: wrong type"),
  (dict(b="1"), "wants float"),
  (dict(c=1), "wants bool"),
  (dict(d=3), "wants str or None"),
  (dict(e=[1, 2]), r"write \(1, 2\)"),
  (dict(e=("a",)), "e: wrong type"),
  (dict(f="z"), "wants 'x' or 'y' or None"),
  (dict(g={"x": "1"}), "g: wrong type"),
  (dict(h="2 weeks"), "or None"),
  (dict(i=dict(size="2")), "where.i.size: wrong type"),
  (dict(j=(2,)), "j: wrong type"),
  (dict(hidden=2), "hidden: no such field of .*test_config:Outer"),
]


@pytest.mark.parametrize("spec", GOOD, ids=str)
def test_values_that_fit(spec):
  schema.check_fields(Outer, dict(a=1) | spec, "where")


@pytest.mark.parametrize(("spec", "message"), BAD, ids=str)
def test_values_that_do_not(spec, message):
  with pytest.raises(ValueError, match=message):
    schema.check_fields(Outer, dict(a=1) | spec, "where")


def test_fields_of_a_flax_module_are_those_of_the_config():
  class Module(nn.Module):
    width: int
    inner: nn.Dense = None

  assert schema.fields(Module) == {"width": int}
  with pytest.raises(ValueError, match="where.width is missing"):
    schema.check_fields(Module, {}, "where")
  schema.check_fields(Module, {}, "where", given={"width": 3})


def test_resolve_finds_classes_by_file_and_by_dotted_path():
  assert schema.resolve("objectives", "itc").__module__ == "vlp_jax.objectives.itc"
  found = schema.resolve("objectives", "collections:OrderedDict")
  assert found.__name__ == "OrderedDict"
  # Not every file of models/ is an encoder.
  assert "vlm" not in schema.kinds("models")
  assert {"vit", "text"} <= set(schema.kinds("models"))


def test_an_import_error_inside_a_component_is_not_hidden(tmp_path, monkeypatch):
  (tmp_path / "their_objective.py").write_text("import not_installed_here\n")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ModuleNotFoundError, match="not_installed_here"):
    schema.resolve("objectives", "their_objective:Objective")


@pytest.mark.parametrize(
  ("duration", "expected"),
  [
    (0, 0),
    (300, 300),
    ("300 steps", 300),
    ("1 step", 1),
    ("2 epochs", 20),  # 1,003 examples of batches of 100
    ("0.1 epochs", 1),
    ("0.5 epochs", 5),
    ("1_000 examples", 10),
    ("1e6 examples", 10_000),
    ("1 example", 1),  # something, however short
    ("0 epochs", 0),
    ("5%", 10),
    ("0.1%", 1),
    ("100 %", 200),
  ],
)
def test_steps(duration, expected):
  sizes = dict(batch_size=100, epoch_size=1003, total_steps=200)
  assert config_lib.steps(duration, **sizes) == expected


@pytest.mark.parametrize("duration", [-1, 1.5, True, None, "", "3", "3 weeks", "5%s"])
def test_no_durations(duration):
  with pytest.raises(ValueError, match="is no duration: write 300"):
    config_lib.steps(duration, batch_size=1, epoch_size=1, total_steps=1)


def test_the_total_is_no_share_of_itself():
  with pytest.raises(ValueError, match="total='5%'"):
    config_lib.steps("5%", batch_size=1, epoch_size=1, total_steps=0)


def test_saved_configs_come_back(file, tmp_path):
  config = config_lib.load(file, ["--config.model.image_mean=(0.5, (1, 'ä'), [2])"])
  text = config_lib.to_json(config)
  assert config_lib.from_json(text) == config
  assert config_lib.from_json(text).model.image_mean == (0.5, (1, "ä"), [2])
  saved = tmp_path / "config.json"
  saved.write_text(config_lib.to_json(config_lib.run(config)), "utf-8")
  loaded = config_lib.load(str(saved), ["--config.batch_size=8"])
  assert loaded.batch_size == 8
  assert config_lib.run(config_lib.load(str(saved))) == config_lib.run(config)
  with pytest.raises(ValueError, match="not a saved config"):
    config_lib.from_json("{")


def test_flatten_is_sorted_text():
  config = ml_collections.ConfigDict(dict(b=dict(c=(1, 2), a="x"), a=None, d={}))
  assert config_lib.flatten(config) == [
    "a = None",
    "b.a = 'x'",
    "b.c = (1, 2)",
    "d = {}",
  ]


def test_configs_need_no_jax():
  """Reading a config costs no seconds, on a machine without an accelerator library."""
  code = (
    "import sys; sys.modules['jax'] = sys.modules['tensorflow'] = None\n"
    "from vlp_jax import cli, config\n"
    "config.run(config.load('configs/albef.py:tiny'))"
  )
  root = pathlib.Path(__file__).parent.parent
  subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
