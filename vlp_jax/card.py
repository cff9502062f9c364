"""Prints what a config reproduces, and where each of its numbers comes from.

vlp-jax card [NAME[:arg]]

Without NAME, it prints a table of all baselines. NAME is a file of configs/ that has a
card, configs/cards/NAME.toml: every value of the config with its source and how sure it
is, departures from the official code, where sources disagree, and published results
with their protocol. The test suite holds each config against its card.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import pathlib
import tomllib
from typing import Any

import ml_collections

from vlp_jax import cli
from vlp_jax import config as config_lib
from vlp_jax import config_file
from vlp_jax import schema

# How sure a value is.
EVIDENCE = {
  "code": "read in the official code",
  "paper": "read in the paper",
  "table": "read in another paper's table",
  "thread": "said by the authors in an issue",
  "derived": "by arithmetic from these",
  "recalled": "from the paper, not read again",
}
# The lists of a card: their columns.
COLUMNS = {
  "values": ("field", "value", "source", "evidence"),
  "ours": ("field", "why"),
  "departures": ("what", "ours", "theirs", "why"),
  "results": ("what", "numbers", "protocol", "source", "evidence"),
}
TEXTS = ("title", "paper", "code", "hardware")
NUMBERS = ("vocabulary", "examples")
# Fields of a config whose defaults a card may state: whose fields they are.
SEAMS = {
  "optim": ("", "vlp_jax.training.optim:Optim"),
  "model.image": ("models", "vit"),
  "model.text": ("models", "text"),
  "model.fusion": ("models.fusion", None),
  "model.codebook": ("models.codebooks", None),
  "model": ("", "vlp_jax.models.vlm:VLM"),
}


@dataclasses.dataclass(frozen=True)
class Card:
  """A file of configs/cards/. Lists are of tuples, as `COLUMNS` names them.

  Attributes:
    title, paper, code, hardware: lines. vocabulary, examples: what the data brings.
    slice: for `vlp-jax plan`: hardware that the run is planned for, "" for none.
    fixtures: what the tests compare with the official code.
    formats: of interop/, that its weights come from and go to.
    values, ours, departures, disagreements, results: see configs/cards/albef.toml.

  A file may say extends = "albef": it then has what that card has, but for the fields
  that it says itself, and those that start with one of `without`. "None" stands for
  None, which TOML lacks.
  """

  title: str
  paper: str
  code: str
  hardware: str
  vocabulary: int
  examples: int
  values: tuple[tuple, ...]
  slice: str = ""
  fixtures: tuple[str, ...] = ()
  formats: tuple[str, ...] = ()
  ours: tuple[tuple, ...] = ()
  departures: tuple[tuple, ...] = ()
  disagreements: tuple[str, ...] = ()
  results: tuple[tuple, ...] = ()


def main(argv: Sequence[str] | None = None) -> None:
  """Reads card and config, checks one against the other, and prints."""
  with cli.user_errors():
    parser = argparse.ArgumentParser(
      prog="vlp-jax card",
      description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME[:arg]", nargs="?")
    name = parser.parse_args(argv).name
    configs = folder()
    if name is None:
      print(
        table(
          {
            n: (card, config, sum(count(card, config).values()))
            for n, card, config in baselines(configs)
          }
        )
      )
      return
    name, _, arg = name.partition(":")
    card = read(configs / "cards" / f"{name}.toml")
    config = config_file.load(f"{configs / name}.py" + (f":{arg}" if arg else ""))
    if not arg:
      faults = check(card, config)
      if faults:
        raise ValueError("\n".join([f"configs/{name}.py is not its card:", *faults]))
    print(render(card, config, count(card, config)))


def baselines(
  configs: pathlib.Path,
) -> Iterator[tuple[str, Card, ml_collections.ConfigDict]]:
  """(name, card, config) of every card of configs/cards, not of its folders."""
  for path in sorted((configs / "cards").glob("*.toml")):
    yield path.stem, read(path), config_file.load(f"{configs / path.stem}.py")


def table(rows: Mapping[str, tuple[Card, Mapping[str, Any], int]]) -> str:
  """All baselines in Markdown. rows: {name: (card, config, number of parameters)}."""
  heads = ("config", "parameters", "objectives", "equal to official code", "formats")
  lines = [f"| {' | '.join(heads)} | published |", "|---" * (len(heads) + 1) + "|"]
  for name, (card, config, parameters) in rows.items():
    published = "–"
    if card.results:
      what, numbers, protocol, source, evidence = card.results[0]
      published = f"{what}: {numbers} ({protocol}; {evidence}: {source})"
    cells = (
      f"`configs/{name}.py`",
      f"{parameters / 1e6:.0f} M",
      ", ".join(config["objectives"]),
      ", ".join(card.fixtures) or "–",
      ", ".join(card.formats) or "–",
      published,
    )
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def folder() -> pathlib.Path:
  """configs/ of the working directory, or that beside the package.

  Raises:
    FileNotFoundError: there is none with cards.
  """
  places = [pathlib.Path("configs"), schema.PACKAGE.parent / "configs"]
  for place in places:
    if (place / "cards").is_dir():
      return place
  raise FileNotFoundError("no folder configs/cards here: run this in the repository.")


def of_config(file: str) -> pathlib.Path | None:
  """Of "configs/albef.py:tiny" it is configs/cards/albef.toml; None: it has none."""
  path = pathlib.Path(file.partition(":")[0]).with_suffix(".toml")
  if "configs" not in path.parts:
    return None
  cut = len(path.parts) - path.parts[::-1].index("configs")
  found = pathlib.Path(*path.parts[:cut], "cards", *path.parts[cut:])
  return found if found.is_file() else None


def read(path: pathlib.Path) -> Card:
  """A card.

  Raises:
    FileNotFoundError: there is none; names those that there are.
    ValueError: it is not of the form that `COLUMNS` says.
  """
  content = _content(path)
  base = content.pop("extends", None)
  without = tuple(f"{start}." for start in content.pop("without", ()))
  if base is not None:
    above = _content(_cards(path) / f"{base}.toml")
    for name in ("values", "ours"):
      own = {row[0] for row in (*content.get("values", ()), *content.get("ours", ()))}
      kept = [
        row
        for row in above.get(name, ())
        if row[0] not in own and not f"{row[0]}.".startswith(without)
      ]
      content[name] = [*content.get(name, ()), *kept]
    keep = ("paper", "code", "hardware", *NUMBERS)
    content = {name: above[name] for name in keep if name in above} | content
  known = {field.name for field in dataclasses.fields(Card)}
  wrong = [f"unknown {name}" for name in content if name not in known]
  wrong += [
    f"missing {name}" for name in (*TEXTS, *NUMBERS, "values") if name not in content
  ]
  for name, columns in COLUMNS.items():
    for row in content.get(name, ()):
      if not isinstance(row, list) or len(row) != len(columns):
        wrong.append(f"{name}: want [{', '.join(columns)}], has {row!r}")
      elif columns[-1] == "evidence" and row[-1] not in EVIDENCE:
        wrong.append(f"{name}: {row[0]}: evidence {row[-1]!r}: want {list(EVIDENCE)}")
  if wrong:
    raise ValueError("\n".join([f"{path}:", *(f"  {line}" for line in wrong)]))
  rows = {name: tuple(map(tuple, content.get(name, ()))) for name in COLUMNS}
  lists = {
    n: tuple(content.get(n, ())) for n in ("fixtures", "formats", "disagreements")
  }
  return Card(**content | rows | lists)


def _cards(path):
  """The folder of all cards: `path` is in it, or in a folder of it."""
  return next((p for p in path.parents if p.name == "cards"), path.parent)


def _content(path):
  if not path.is_file():
    cards = _cards(path)
    there = sorted(str(f.relative_to(cards))[:-5] for f in cards.rglob("*.toml"))
    raise FileNotFoundError(f"no card {path}: there are {', '.join(there)}.")
  try:
    return tomllib.loads(path.read_text("utf-8"))
  except (tomllib.TOMLDecodeError, UnicodeError) as error:
    raise ValueError(f"{path}: no TOML: {error}.") from error


def check(card: Card, config: Mapping[str, Any]) -> list[str]:
  """What of a config is not as its card says: one line each, none if all is."""
  said = leaves(config)
  stated = {row[0]: row[1] for row in card.values}
  faults = []
  for field, value in stated.items():
    found = said[field] if field in said else default(config, field)
    found = _lists(found)
    value = None if value == "None" else value
    if found != value or isinstance(found, bool) != isinstance(value, bool):
      faults.append(f"  {field}: the config has {found!r}, the card {value!r}")
  covered = {*stated, *(row[0] for row in card.ours)}
  faults += [
    f"  {field}={value!r}: say in the card where it comes from"
    for field, value in said.items()
    if field not in covered and not any(field.startswith(f"{c}.") for c in covered)
  ]
  return faults


def _lists(value):
  """Tuples as TOML has them."""
  return [_lists(x) for x in value] if isinstance(value, (tuple, list)) else value


def leaves(config: Mapping[str, Any], where: str = "") -> dict[str, Any]:
  """{"optim.lr": 1e-4}: all that a config states."""
  out = {}
  for name in config:
    value, path = config[name], f"{where}.{name}".lstrip(".")
    inner = hasattr(value, "keys")
    out |= leaves(value, path) if inner else {path: value}
  return out


def default(config: Mapping[str, Any], path: str) -> Any:
  """What a field is that the config does not state.

  Raises:
    ValueError: there is no such field.
  """
  where, _, name = path.rpartition(".")
  spec = config
  for key in where.split("."):
    spec = spec[key] if key in spec else {}
  if where.startswith("objectives."):
    seam, kind = "objectives", where.removeprefix("objectives.")
  elif where in SEAMS:
    seam, kind = SEAMS[where]
  else:
    raise ValueError(f"card: {path}: the config states no such value.")
  kind = spec["type"] if seam and "type" in spec else kind
  cls = schema.resolve(seam, kind, where=where)
  fields = {field.name: field for field in dataclasses.fields(cls)}
  if name not in fields or fields[name].default is dataclasses.MISSING:
    raise ValueError(f"card: {path}: no such field with a default, nor in the config.")
  return fields[name].default


def count(card: Card, config: Mapping[str, Any]) -> dict[str, int]:
  """{"model.image": parameters, …}: from shapes alone."""
  # Here: whoever only reads cards need not wait for jax.
  from vlp_jax import job as job_lib
  from vlp_jax.ops import tree
  from vlp_jax.training import step as step_lib

  run = config_lib.run(config)
  made, batch, _ = job_lib.trained_on(
    run,
    vocab=stand_in(card.vocabulary, run.tokenizer),
    length=run.tokenizer["length"],
    examples=card.examples,
  )
  params = step_lib.abstract_params(made, batch)
  counts = {}
  for path, leaf in tree.flatten(params).items():
    first, second = path.split("/")[:2]
    towers = ("image", "text", "fusion", "decoder", "codebook")
    name = f"model.{second}" if second in towers else first.replace("_", ".", 1)
    counts[name] = counts.get(name, 0) + leaf.size
  return counts


def stand_in(size: int, tokenizer: Mapping[str, Any]) -> Any:
  """A vocabulary for shapes alone, with the special ids that `tokenizer` would have."""
  from vlp_jax.data import vocab as vocab_lib

  ids = dict(pad=0, unk=1, cls=2, sep=3, mask=4)
  if tokenizer.get("roles"):
    ids |= dict(dec=5, enc=6)
  return vocab_lib.Vocab(size=size, **ids)


def render(card: Card, config: Mapping[str, Any], counts: Mapping[str, int]) -> str:
  """The card as text."""
  said = leaves(config)
  lines = [card.title, f"  paper     {card.paper}", f"  code      {card.code}"]
  lines += [f"  hardware  {card.hardware}"]
  if card.fixtures:
    lines.append(f"  equal to  its official code: {', '.join(card.fixtures)}")
  if card.formats:
    lines.append(f"  weights   in and out: {', '.join(card.formats)}")
  lines += ["", "Parameters"]
  lines += [f"  {name:<16} {number:>13,}" for name, number in counts.items()]
  lines.append(f"  {'in all':<16} {sum(counts.values()):>13,}")
  if said.get("ema_decay") is not None:
    lines.append("  and as many again: their moving average, the teacher")
  rows = {row[0]: row for row in card.values}
  parts = dict(
    Architecture=("model", "tokenizer"),
    Start=("init",),
    Objectives=("objectives", "ema_decay"),
    Data=("data", "batch_size", "total", "seed"),
    Optimiser=("optim",),
    Evaluation=("evals",),
  )
  for title, tops in parts.items():
    chosen = [row for field, row in rows.items() if field.split(".")[0] in tops]
    shown = [
      f"{field} = {said.get(field, value)!r}\n      {evidence}: {source}"
      for field, value, source, evidence in chosen
    ]
    lines += _section(title, shown)
  own = [(field, why) for field, why in card.ours if field in said]
  lines += _section("Of our own", [f"{f} = {said[f]!r}: {why}" for f, why in own])
  lines += _section(
    "Departures from the official code",
    [
      f"{what}: {ours}; officially {theirs}. {why[:1].upper()}{why[1:]}."
      for what, ours, theirs, why in card.departures
    ],
  )
  lines += _section("Where sources disagree", card.disagreements)
  lines += _section(
    "Published results",
    [
      f"{what}: {numbers}\n      {protocol}\n      {evidence}: {source}"
      for what, numbers, protocol, source, evidence in card.results
    ],
  )
  used = {row[-1] for row in (*card.values, *card.results)}
  lines += _section("Evidence", [f"{k}: {v}" for k, v in EVIDENCE.items() if k in used])
  return "\n".join(lines)


def _section(title, rows):
  return ["", title, *(f"  {row}" for row in rows)] if rows else []


if __name__ == "__main__":
  main()
