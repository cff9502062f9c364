"""Cards: every config that has one is as it says, and each fault is told."""

import dataclasses
import pathlib
import re

import pytest

from vlp_jax import card as card_lib
from vlp_jax import cli
from vlp_jax import config_file
from vlp_jax.interop import formats

ROOT = pathlib.Path(__file__).parent.parent
CARDS = ROOT / "configs" / "cards"
REFERENCE = ROOT / "tests" / "reference"
NAMES = sorted(str(f.relative_to(CARDS).with_suffix("")) for f in CARDS.rglob("*.toml"))


def load(name):
  card = card_lib.read(CARDS / f"{name}.toml")
  return card, config_file.load(str(ROOT / "configs" / f"{name}.py"))


@pytest.mark.parametrize("name", NAMES)
def test_every_value_of_a_config_is_in_its_card(name):
  card, config = load(name)
  assert card_lib.check(card, config) == []
  fields = [row[0] for row in (*card.values, *card.ours)]
  assert len(fields) == len(set(fields))


def test_the_readme_has_the_table_of_baselines():
  """What `vlp-jax card` prints; counted here is but one, which takes a while."""
  rows = {}
  for name, card, config in card_lib.baselines(ROOT / "configs"):
    counted = name == "albef"
    total = sum(card_lib.count(card, config).values()) if counted else 0
    rows[name] = (card, config, total)
  readme = (ROOT / "README.md").read_text("utf-8").splitlines()
  missing = []
  for line in card_lib.table(rows).splitlines():
    pattern = re.escape(line).replace(re.escape("| 0 M |"), r"\| [1-9]\d* M \|")
    if not any(re.fullmatch(pattern, other) for other in readme):
      missing.append(line)
  assert not missing, "put there what `vlp-jax card` prints"
  assert sum(line.startswith("| `configs/") for line in readme) == len(rows)


def test_what_cards_name_is_there():
  for name in NAMES:
    card, _ = load(name)
    assert set(card.formats) <= set(formats.names()), name
    there = {str(f.relative_to(REFERENCE)) for f in REFERENCE.rglob("*")}
    assert set(card.fixtures) <= there, name


def test_there_are_cards():
  assert "albef" in NAMES


def test_what_is_not_as_the_card_says_is_told():
  card, config = load("albef")
  config = config.to_dict()
  config["optim"] |= dict(lr=2e-4, clip_norm=1.0)
  config["tokenizer"]["sep"] = 0
  config["model"]["image"]["norm_eps"] = 1e-5
  assert card_lib.check(card, config) == [
    "  tokenizer.sep: the config has 0, the card False",
    "  model.image.norm_eps: the config has 1e-05, the card 1e-06",
    "  optim.lr: the config has 0.0002, the card 0.0001",
    "  optim.clip_norm=1.0: say in the card where it comes from",
  ]
  odd = dataclasses.replace(card, values=(("optim.nope", 1, "", "code"),))
  with pytest.raises(ValueError, match=r"card: optim.nope: no such field"):
    card_lib.check(odd, config)


def test_cards_that_are_none(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no card .*there are .*albef"):
    card_lib.read(CARDS / "nope.toml")
  path = tmp_path / "x.toml"
  path.write_text("title = 'x")
  with pytest.raises(ValueError, match="no TOML"):
    card_lib.read(path)
  path.write_text(
    "title = 'x'\nvalues = [['a', 1, 'there', 'guessed'], ['b', 2]]\nodd = 1\n"
  )
  with pytest.raises(ValueError) as error:
    card_lib.read(path)
  for text in (
    "unknown odd",
    "missing paper",
    "values: a: evidence 'guessed'",
    "want [field, value, source, evidence], has ['b', 2]",
  ):
    assert text in str(error.value)


def test_the_printed_card(capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  card_lib.main(["albef"])
  text = capsys.readouterr().out
  for line in (
    f"  {'model.image':<16}    85,844,736",
    "optim.lr = 0.0001\n      code: configs/Pretrain.yaml optimizer.lr",
    "Departures from the official code",
    "the model fine-tuned on COCO",
    "Warm-up: the code runs 2,000 iterations, the paper says 1,000.",
  ):
    assert line in text
  with pytest.raises(SystemExit) as error:
    card_lib.main(["nope"])
  assert error.value.code == cli.EXIT_USER_ERROR
  assert "there are albef" in capsys.readouterr().err
