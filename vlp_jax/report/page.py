"""The page: report.html, and its pictures in report/ beside it."""

from collections.abc import Mapping, Sequence
import html
import os
import pathlib
import shutil

import numpy as np

from vlp_jax.evaluators import retrieval
from vlp_jax.ops import metrics
from vlp_jax.report import curves
from vlp_jax.report import maps as maps_lib
from vlp_jax.report import pictures
from vlp_jax.report import style
from vlp_jax.report import tables

QUERIES = 6
ANSWERS = 5


def write(
  out_dir: str | os.PathLike,
  *,
  title: str,
  results: tables.Results,
  earlier: Mapping[str, int | None] | None = None,
  facts: Mapping[str, str] | None = None,
  config: str = "",
  log: str | os.PathLike | None = None,
  objectives: Sequence[str] = (),
  found: Mapping[str, tuple[retrieval.Result, pictures.Reader]] | None = None,
  maps: Sequence[maps_lib.WordMaps] = (),
) -> pathlib.Path:
  """Writes `report.html`, over an earlier one, and returns its path.

  Args:
    out_dir: the run's folder.
    title: of the page.
    results: {evaluation: {metric: value}}, what the evaluators returned.
    earlier: {evaluation: step} of those results that are not of this checkpoint, or
      not of now; see `results.merge`.
    facts: short lines about the run, e.g. {"Steps": "300", "Machine": "2 CPU cores"}.
    config: the run's config as text; saved beside the page and linked.
    log: the run's JSON-lines log, for the curves; None: no curves.
    objectives: names of the objectives, whose losses are drawn.
    found: {evaluation: (`retrieval.Evaluator.last`, `reader(source)`)}.
    maps: of `word_maps`.
  """
  out_dir = pathlib.Path(out_dir)
  folder = out_dir / "report"
  # An earlier report's pictures would stay where this one has fewer.
  if folder.exists():
    shutil.rmtree(folder)
  folder.mkdir(parents=True)
  parts = [_head(title, facts or {}, config, folder)]
  parts += [_table(each) for each in tables.tables(results, earlier or {})]
  if log is not None:
    parts.append(_curves(log, folder, objectives, list(results)))
  for name, (result, read) in (found or {}).items():
    parts.append(_sheets(name, result, read, folder))
  if maps:
    parts.append(_maps(maps, folder))
  page = _PAGE.format(title=html.escape(title), style=style.CSS, body="\n".join(parts))
  path = out_dir / "report.html"
  partial = out_dir / "report.html.partial"
  partial.write_text(page, "utf-8")
  os.replace(partial, path)
  return path


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _head(title, facts, config, folder):
  lines = [f"<h1>{html.escape(title)}</h1>"]
  if facts:
    lines.append('<dl class="facts">')
    for key, value in facts.items():
      lines.append(
        f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd></div>"
      )
    lines.append("</dl>")
  if config:
    (folder / "config.txt").write_text(config, "utf-8")
    lines.append(
      '<details><summary>Config (<a href="report/config.txt">as a file</a>)</summary>'
      f"<pre>{html.escape(config)}</pre></details>"
    )
  return "<header>\n" + "\n".join(lines) + "\n</header>"


def _table(each: tables.Table):
  def row(cells, tag="td"):
    first, *rest = (html.escape(cell) for cell in cells)
    more = "".join(f"<{tag}>{cell}</{tag}>" for cell in rest)
    return f'<tr><th scope="row">{first}</th>{more}</tr>'

  groups = ""
  if each.groups:
    cells = (f'<th colspan="{n}">{html.escape(name)}</th>' for name, n in each.groups)
    groups = f'<tr class="groups">{"".join(cells)}</tr>\n'
  note = f'<p class="note">{html.escape(each.note)}</p>\n' if each.note else ""
  rows = "\n".join(row(cells) for cells in each.rows)
  return (
    f'<section>\n<h2>{html.escape(each.title)}</h2>\n{note}<div class="wide"><table>\n'
    f"<thead>{groups}{row(each.header, 'th')}</thead>\n<tbody>\n{rows}\n</tbody>\n"
    "</table></div>\n</section>"
  )


def _curves(log, folder, objectives, evals):
  drawn = curves.plot_losses(
    curves.read_log(log), folder / "losses.png", objectives=objectives, evals=evals
  )
  if not drawn:
    return '<section><h2>Losses</h2><p class="note">The log has none yet.</p></section>'
  return (
    "<section>\n<h2>Losses</h2>\n"
    '<p class="note">Each objective by itself, before its weight; the dark line is a'
    " running mean.</p>\n"
    f'<img class="plot" src="report/losses.png" alt="Losses by step:'
    f' {html.escape(", ".join(drawn))}">\n</section>'
  )


def _sheets(name, result: retrieval.Result, read, folder):
  """Contact sheets: what some texts and some images found."""
  saved = {}

  def figure(image, mark=""):
    if image not in saved:
      index = int(result.example_index[image])
      path = folder / f"{_slug(name)}_{index}"
      saved[image] = f"report/{pictures.save(read(index), path).name}"
    return f'<figure class="shot {mark}"><img src="{saved[image]}" alt="">{_sign(mark)}'

  owner = result.text_to_image
  rows = []
  # Evenly over the set, whatever was found: not the best, not the worst.
  for text in _evenly(len(owner)):
    top = metrics.ranking(result.score_t2i[text : text + 1], ANSWERS)[0]
    shots = "".join(
      figure(image, _mark(image == owner[text])) + "</figure>" for image in top
    )
    rows.append(
      f'<div class="query"><p>{html.escape(result.captions[text])}</p>'
      f'<div class="shots">{shots}</div></div>'
    )
  texts_first = "\n".join(rows)
  rows = []
  for image in _evenly(len(result.image_id)):
    top = metrics.ranking(result.score_i2t[image : image + 1], ANSWERS)[0]
    lines = "".join(
      f'<li class="{_mark(owner[text] == image)}">{_sign(_mark(owner[text] == image))}'
      f"<span>{html.escape(result.captions[text])}</span></li>"
      for text in top
    )
    rows.append(f'<div class="query">{figure(image)}</figure><ol>{lines}</ol></div>')
  images_first = "\n".join(rows)
  legend = (
    f'<p class="note">The first {ANSWERS} answers, best first, to {QUERIES} queries'
    ' spread evenly over the set. <span class="right">✓ right</span>,'
    ' <span class="wrong">✗ wrong</span>.</p>'
  )
  return (
    f"<section>\n<h2>{html.escape(name)}: texts and the images they find</h2>\n"
    f"{legend}\n"
    f'<div class="texts">{texts_first}</div>\n</section>\n'
    f"<section>\n<h2>{html.escape(name)}: images and the texts they find</h2>\n"
    f"{legend}\n"
    f'<div class="images">{images_first}</div>\n</section>'
  )


def _maps(maps, folder):
  rows = []
  for i, each in enumerate(maps):
    shots = [(each.image, "image")]
    shots += [
      (pictures.heated(each.image, heat), word)
      for word, heat in zip(each.words, each.maps, strict=True)
    ]
    cells = []
    for j, (image, word) in enumerate(shots):
      path = pictures.save(image, folder / f"map_{i}_{j}")
      kind = "" if j else ' class="given"'
      cells.append(
        f'<figure><img src="report/{path.name}" alt="">'
        f"<figcaption{kind}>{html.escape(word)}</figcaption></figure>"
      )
    rows.append(
      f'<div class="query"><p>{html.escape(each.caption)}</p>'
      f'<div class="shots">{"".join(cells)}</div></div>'
    )
  return (
    "<section>\n<h2>Where each word looks</h2>\n"
    '<p class="note">Grad-CAM of the fusion stack&rsquo;s cross-attention for the ITM'
    " logit of &ldquo;match&rdquo;; red is most. Each word has its own scale.</p>\n"
    f'<div class="words">{"".join(rows)}</div>\n</section>'
  )


def _evenly(count):
  return np.unique(np.linspace(0, count - 1, QUERIES).round().astype(int))


def _mark(right):
  return "right" if right else "wrong"


def _sign(mark):
  return {"right": "<b>✓</b>", "wrong": "<b>✗</b>"}.get(mark, "")


def _slug(name):
  return "".join(c if c.isalnum() else "_" for c in name)
