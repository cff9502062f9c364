"""metrics.jsonl over crashes and resumptions, and TensorBoard's event files."""

import errno
import json
import pathlib

import numpy as np
import pytest

from vlp_jax.training import writer as writer_lib


def lines(directory):
  return (directory / "metrics.jsonl").read_text().splitlines()


def write(directory, steps, *, start=0, tensorboard=False):
  writer = writer_lib.Writer(directory, start=start, tensorboard=tensorboard)
  for step in steps:
    writer.write(step, {"loss": 1.0 / step})
  writer.close()


def test_one_object_a_line_with_plain_numbers(tmp_path):
  writer = writer_lib.Writer(tmp_path, tensorboard=False)
  writer.write(1, {"loss": np.float32(0.5), "examples": 8, "note": "warm"})
  # On the disk before the file is closed: a killed run keeps its lines.
  (line,) = lines(tmp_path)
  writer.close()
  assert json.loads(line) == {"step": 1, "loss": 0.5, "examples": 8, "note": "warm"}
  assert line.startswith('{"step": 1,')


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("-inf")])
def test_what_is_no_number_is_null(tmp_path, value):
  writer = writer_lib.Writer(tmp_path, tensorboard=True)
  writer.write(1, {"loss": value})
  writer.close()
  assert lines(tmp_path) == ['{"step": 1, "loss": null}']


def test_resuming_cuts_what_was_not_saved(tmp_path):
  write(tmp_path, range(1, 8))
  write(tmp_path, [5, 6], start=4)
  assert [line["step"] for line in writer_lib.read(tmp_path / "metrics.jsonl")] == [
    *range(1, 7)
  ]
  assert not list(tmp_path.glob("*.part"))


def test_a_fresh_run_starts_a_fresh_file(tmp_path):
  write(tmp_path, range(1, 4))
  write(tmp_path, [1])
  assert len(lines(tmp_path)) == 1


def test_resuming_leaves_the_file_of_a_run_that_went_through(tmp_path):
  (tmp_path / "whole").mkdir()
  write(tmp_path / "whole", range(1, 10))
  write(tmp_path, range(1, 7))
  write(tmp_path, range(5, 10), start=4)
  path = "metrics.jsonl"
  assert (tmp_path / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()


@pytest.mark.parametrize("rest", ['{"step": 4, "lo', '{"step": 4', "{", "4", "[]"])
def test_a_torn_last_line_is_dropped(tmp_path, rest):
  write(tmp_path, range(1, 4))
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write(rest)
  assert len(writer_lib.read(tmp_path / "metrics.jsonl")) == 3
  write(tmp_path, [4], start=9)
  assert [json.loads(line)["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_bytes_that_a_crash_left_are_dropped(tmp_path):
  # A file system that had allotted the blocks, but not yet written them.
  write(tmp_path, range(1, 4))
  with (tmp_path / "metrics.jsonl").open("ab") as file:
    file.write(b"\0\0\xff\xfe")
  write(tmp_path, [4], start=3)
  assert [json.loads(line)["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_read_without_a_file(tmp_path):
  assert writer_lib.read(tmp_path / "metrics.jsonl") == []


def test_a_full_disk_names_the_file_and_the_way_out(tmp_path):
  if not pathlib.Path("/dev/full").exists():
    pytest.skip("no /dev/full")
  writer = writer_lib.Writer(tmp_path, tensorboard=False)
  writer._file.close()
  writer._file._file = open("/dev/full", "w")
  with pytest.raises(
    OSError, match="metrics.jsonl cannot be written.*start again"
  ) as e:
    writer.write(1, {"loss": 1.0})
  assert e.value.__cause__.errno == errno.ENOSPC
  # Whoever closes it on the way out does not hide the first error.
  writer.close()


def test_tensorboard_gets_the_numbers(tmp_path):
  write(tmp_path, range(1, 4), tensorboard=True)
  (events,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
  data = events.read_bytes()
  assert data.count(b"loss") == 3


def test_the_other_processes_write_nothing(tmp_path):
  writer = writer_lib.NoWriter()
  writer.write(1, {"loss": 1.0})
  writer.close()
  assert not list(tmp_path.iterdir())
