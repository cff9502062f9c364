"""What a run may say: defaults, checks, and errors that name the way out."""

import pathlib
import subprocess
import sys

import pytest

from vlp_jax import config as config_lib
from vlp_jax import config_file

ROOT = pathlib.Path(__file__).parent.parent
FILE = str(ROOT / "tests" / "configs_for_tests" / "small.py")


def test_run_has_the_defaults_and_leaves_out_what_is_none():
  run = config_lib.run(config_file.load(FILE, ["--config.objectives.itm=None"]))
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
def test_errors_name_field_file_and_way_out(override, message):
  with pytest.raises(ValueError, match=message):
    config_lib.check(config_lib.run(config_file.load(FILE, [f"--config.{override}"])))


def test_missing_fields():
  config = config_file.load(FILE)
  del config.model.image.patch
  with pytest.raises(
    ValueError, match="model.image.patch is missing: .*vit.py Encoder wants int"
  ):
    config_lib.check(config_lib.run(config))
  del config.batch_size
  with pytest.raises(ValueError, match="config: batch_size is missing"):
    config_lib.run(config)


def test_configs_need_no_jax():
  """Reading a config costs no seconds, on a machine without an accelerator library."""
  code = (
    "import sys; sys.modules['jax'] = sys.modules['tensorflow'] = None\n"
    "from vlp_jax import cli, config, config_file\n"
    "config.run(config_file.load('configs/albef.py:tiny'))"
  )
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
