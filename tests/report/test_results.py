"""results.json: what is kept, what is replaced, and what cannot be read."""

import json
import logging

import pytest

from vlp_jax import report
from vlp_jax.report import tables


def test_others_are_kept_with_their_step(tmp_path):
  path = tmp_path / "results.json"
  first = {"itm": {"accuracy": 60.0}, "mlm": {"accuracy": 50.0}}
  assert report.merge(path, first, step=300) == (first, {})
  results, earlier = report.merge(path, {"mlm": {"gain": 7.0}}, step=400)
  assert results == {"itm": {"accuracy": 60.0}, "mlm": {"gain": 7.0}}
  assert earlier == {"itm": 300}
  assert json.loads(path.read_text()) == {
    "itm": {"step": 300, "accuracy": 60.0},
    "mlm": {"step": 400, "gain": 7.0},
  }
  assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_a_row_without_a_step_is_kept(tmp_path):
  path = tmp_path / "results.json"
  path.write_text('{"itm": {"accuracy": 60.0}}')
  results, earlier = report.merge(path, {}, step=1)
  assert results == {"itm": {"accuracy": 60.0}} and earlier == {"itm": None}
  page = report.write(tmp_path, title="x", results=results, earlier=earlier)
  assert "an earlier evaluation, of an unknown step." in page.read_text("utf-8")


@pytest.mark.parametrize("text", ['{"itm": {"acc', "[]", '{"itm": 3}', "\x00"])
def test_a_file_that_is_none_of_ours_is_told_and_replaced(tmp_path, text, caplog):
  path = tmp_path / "results.json"
  path.write_text(text)
  with caplog.at_level(logging.WARNING, "vlp_jax"):
    results, earlier = report.merge(path, {"itm": {"accuracy": 1.0}}, step=2)
  assert results == {"itm": {"accuracy": 1.0}} and not earlier
  assert "results.json: is not as an evaluation leaves it" in caplog.text
  assert json.loads(path.read_text()) == {"itm": {"step": 2, "accuracy": 1.0}}


def test_tables_note_what_is_of_earlier():
  results = {"held_out": {"loss": 1.5}, "other": {"loss": 2.5}}
  made = tables.tables(results, {"other": 1200})
  notes = {table.title: table.note for table in made}
  told = "Not evaluated this time: from an earlier evaluation, of step 1,200."
  assert notes == {"held_out": "", "other": told}
