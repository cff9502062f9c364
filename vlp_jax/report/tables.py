"""Results as tables: one description of them, for the terminal and for the page."""

from collections.abc import Mapping, Sequence
import dataclasses
import types

Results = Mapping[str, Mapping[str, float]]

KS = (1, 5, 10)
# Prefix of a metric: what a row of the retrieval table is called.
RETRIEVAL = {
  "itc": "ITC alone",
  "itm": "ITM re-ranked",
  "all": "every pair fused",
  "chance": "chance",
}


@dataclasses.dataclass(frozen=True)
class Table:
  """Columns and rows; a row's first cell is its name.

  `groups` names spans of columns above the header: (name, number of columns).
  """

  title: str
  header: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]
  groups: tuple[tuple[str, int], ...] = ()
  note: str = ""


def tables(
  results: Results, earlier: Mapping[str, int | None] = types.MappingProxyType({})
) -> list[Table]:
  """The tables of an evaluation's results, {evaluation: {metric: value}}.

  earlier: {evaluation: step, or None} of those that are not of the report's
  checkpoint, which their notes tell.
  """
  out = [
    (name, make(name, values))
    for key, make in KINDS.items()
    for name, values in results.items()
    if key in values
  ]
  rest = {n: v for n, v in results.items() if v and not any(k in v for k in KINDS)}
  out += [(name, _plain(name, values)) for name, values in rest.items()]
  return [_told(each, earlier[name]) if name in earlier else each for name, each in out]


def _told(each, step):
  """The table with a note on when it was made."""
  which = "an unknown step" if step is None else f"step {step:,}"
  note = f"Not evaluated this time: from an earlier evaluation, of {which}."
  return dataclasses.replace(each, note=f"{note} {each.note}".rstrip())


def table(results: Results) -> str:
  """The results as aligned text, {evaluation: {metric: value}}."""
  return "\n\n".join(_text(each) for each in tables(results))


def percent(value: float) -> str:
  """One decimal; two below one, where chance levels live."""
  return f"{value:.1f}" if value >= 1 or value == 0 else f"{value:.2f}"


def _retrieval(name, values):
  keys = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in KS] + ["mean"]
  rows = []
  for prefix, label in RETRIEVAL.items():
    if f"{prefix}/i2t_r1" in values:
      cells = (values.get(f"{prefix}/{key}") for key in keys)
      rows.append((label, *("" if c is None else percent(c) for c in cells)))
  recalls = tuple(f"R@{k}" for k in KS)
  return Table(
    f"{name}: zero-shot retrieval, %",
    ("", *recalls, *recalls, "mean"),
    tuple(rows),
    groups=(("", 1), ("image → text", 3), ("text → image", 3), ("", 1)),
    note="A query counts at k if a right answer is among the first k.",
  )


def _itm(name, values):
  kinds = {
    "random": "another image's caption",
    "hard": "the most similar wrong caption",
  }
  rows = [
    (label, *(percent(v) for v in (values[key], values["true"], values[total])))
    for (key, label), total in zip(
      kinds.items(), ("accuracy", "accuracy_hard"), strict=True
    )
  ]
  return Table(
    f"{name}: does the caption match? (ITM), %",
    ("a mismatch is", "mismatches told", "matches told", "accuracy"),
    tuple(rows),
    note="As many pairs match as not: guessing gives 50 %.",
  )


def _mlm(name, values):
  kinds = [key.rpartition("/")[0] for key in values if key.endswith("accuracy_blank")]
  rows = []
  for kind in kinds:
    prefix = f"{kind}/" if kind else ""
    blank, seen = values[f"{prefix}accuracy_blank"], values[f"{prefix}accuracy"]
    row = (kind or "all", percent(seen), percent(blank), f"{seen - blank:+.1f}")
    rows.append(row)
  return Table(
    f"{name}: masked words filled in (MLM), %",
    ("words", "with image", "image blanked", "difference"),
    tuple(rows),
    note="The difference is what the model reads from the image.",
  )


def _caption(name, values):
  kinds = [f"bleu_{n}" for n in (1, 2, 3, 4)] + ["rouge_l", "cider"]
  return Table(
    f"{name}: captions",
    ("", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"),
    (("written", *(percent(values[kind]) for kind in kinds)),),
    note="In hundredths. METEOR and SPICE, which are Java programs, are left out.",
  )


def _answers(name, values):
  types = {k: v for k, v in values.items() if k.startswith("answer_type/")}
  heads = [key.partition("/")[2] for key in types]
  cells = [percent(value) for value in (values["vqa_accuracy"], *types.values())]
  return Table(
    f"{name}: answers (VQA accuracy), %",
    ("", "all", *heads),
    ((f"{values['questions']:,.0f} questions", *cells),),
    note="An answer that three of the others gave is right, one that two gave 2/3.",
  )


def _plain(name, values):
  rows = tuple((key, f"{value:.4g}") for key, value in values.items())
  return Table(name, ("", "value"), rows)


# A metric that says what kind of table the results are.
KINDS = {
  "itc/mean": _retrieval,
  "all/mean": _retrieval,
  "accuracy_hard": _itm,
  "accuracy_blank": _mlm,
  "cider": _caption,
  "vqa_accuracy": _answers,
}


def _text(each: Table) -> str:
  lines: Sequence[Sequence[str]] = [each.header, *each.rows]
  widths = [max(len(line[i]) for line in lines) for i in range(len(each.header))]

  def line(cells):
    first, *rest = cells
    right = (cell.rjust(w + 2) for cell, w in zip(rest, widths[1:], strict=True))
    return (first.ljust(widths[0]) + "".join(right)).rstrip()

  out = [each.title]
  if each.groups:
    at, above = 0, ""
    for label, span in each.groups:
      width = sum(widths[at : at + span]) + 2 * (span if at else span - 1)
      above += label.center(width) if label else " " * width
      at += span
    out.append(above.rstrip())
  out += [line(each.header), "─" * (sum(widths) + 2 * (len(widths) - 1))]
  return "\n".join(out + [line(row) for row in each.rows])
