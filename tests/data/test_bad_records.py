"""What training data tell of themselves: counts, the log, mistakes, threads left."""

import dataclasses
import itertools
import logging
import threading

import numpy as np
import pytest

from tests.data import pictures
from vlp_jax.data import evaluation
from vlp_jax.data import pipeline
from vlp_jax.data import records

PP = "decode|random_resized_crop(8, min_area=0.3)|flip|randaugment(2, 7)"
TOKENIZER = pictures.Tokenizer()
ZERO = (b"", ["a"])
SOURCE = pictures.source(10, captions=3)


def batches(source, **fields):
  fields = dict(batch_size=10, seed=0, max_bad=1.0) | fields
  return pipeline.train_batches(source, PP, TOKENIZER, **fields)


def test_a_process_reads_only_its_rows():
  read = []

  @dataclasses.dataclass(frozen=True)
  class Watched(pictures.Source):
    def read(self, indices):
      read.append(len(indices))
      return super().read(indices)

  made = batches(Watched(SOURCE.records), rows=np.array([2, 3]))
  assert next(made)["image"].shape[0] == 2
  assert set(read) == {2}


@pytest.mark.parametrize(
  "fields, said",
  [
    (dict(batch_size=0), "batch_size=0"),
    (dict(rows=np.array([9, 10])), "rows=\\[9, 10\\]: want some of 0 … 9"),
    (dict(start=-6), "start=-6"),
    (dict(source=pictures.Source(())), "data.source has no examples"),
  ],
)
def test_mistakes_are_told_before_the_first_batch(fields, said):
  with pytest.raises(ValueError, match=said):
    batches(**dict(source=SOURCE) | fields)


def test_an_error_of_the_source_is_no_page_of_tensorflow(capfd):
  @dataclasses.dataclass(frozen=True)
  class Dies(pictures.Source):
    def read(self, indices):
      raise PermissionError("disk 3 is locked")

  with pytest.raises(PermissionError, match="disk 3 is locked"):
    next(batches(Dies(SOURCE.records)))
  assert "Traceback" not in capfd.readouterr().err


def test_the_count_is_of_what_was_handed_out():
  made = batches(pictures.source(10, broken={4: ZERO}))
  assert not made.bad  # although some batches are ready by now
  counts = []
  for _ in range(5):
    next(made)
    counts.append(made.bad["empty file"])
  assert counts[0] >= 1 and (np.diff(counts) >= 1).all()


def test_the_log_names_some_and_then_counts(caplog):
  source = pictures.source(10, broken=dict.fromkeys(range(5), ZERO))
  with caplog.at_level(logging.WARNING, "vlp_jax"):
    for _ in itertools.islice(batches(source), 20):
      pass
  lines = [record.getMessage() for record in caplog.records]
  assert sum("passed over pic" in line for line in lines) == records.NAMED
  assert "data: passed over 100 so far: 100 empty file" in lines
  assert len(lines) == records.NAMED + 1


def test_a_source_says_what_it_could_not_read():
  @dataclasses.dataclass(frozen=True)
  class Gone(pictures.Source):
    def _example(self, index):
      example = super()._example(index)
      return example | ({"error": "file is missing"} if index == 2 else {})

  made = batches(Gone(SOURCE.records))
  assert 2 not in next(made)["image_id"]
  assert set(made.bad) == {"file is missing"}
  with pytest.raises(ValueError, match=r"pic2\.jpg is broken: file is missing"):
    list(evaluation.eval_images(Gone(SOURCE.records), "decode", batch_size=4))


def test_an_evaluation_that_is_left_early_leaves_no_thread():
  before = threading.active_count()
  made = evaluation.eval_images(SOURCE, "decode|resize(8)", batch_size=2)
  next(made)
  made.close()
  assert threading.active_count() <= before
