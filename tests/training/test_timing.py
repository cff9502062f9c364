"""The progress line and its rates, by a clock that the test winds."""

import io
import logging

import jax
import jax.numpy as jnp
import pytest

from vlp_jax.training import course
from vlp_jax.training import timing


class Clock:
  def __init__(self, monkeypatch):
    self.now = 1000.0
    monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def clock(monkeypatch):
  return Clock(monkeypatch)


def slow(clock, *, seconds):
  while True:
    clock.now += seconds
    yield None


def progress(clock, stream, *, start=0, total=100, wait=1.0, **fields):
  waiting = timing.Waiting(slow(clock, seconds=wait))
  return (
    timing.Progress(
      start=start, total=total, batch_size=8, waiting=waiting, stream=stream, **fields
    ),
    waiting,
  )


def test_waiting_counts_the_time_for_the_next(clock):
  waiting = timing.Waiting(slow(clock, seconds=2.0))
  next(waiting)
  clock.now += 5.0
  next(waiting)
  assert waiting.seconds == 4.0


def test_waiting_ends_and_fails_as_its_items_do(clock):
  assert list(timing.Waiting([1, 2])) == [1, 2]

  def fails():
    clock.now += 3.0
    raise ValueError("broken")
    yield

  waiting = timing.Waiting(fails())
  with pytest.raises(ValueError, match="broken"):
    next(waiting)
  assert waiting.seconds == 3.0


def test_rates_since_the_call_before(clock):
  told, waiting = progress(clock, io.StringIO())
  next(waiting)
  clock.now += 3.0
  assert told.rates(2) == {"examples_per_second": 2 * 8 / 4.0, "input_wait": 0.25}
  clock.now += 1.0
  assert told.rates(3) == {"examples_per_second": 8.0, "input_wait": 0.0}


def test_paused_time_is_not_training(clock):
  told, _ = progress(clock, io.StringIO())
  clock.now += 2.0
  with told.paused():
    clock.now += 50.0
  assert told.rates(2)["examples_per_second"] == 8.0
  clock.now += 1.0
  assert told.rates(3)["examples_per_second"] == 8.0


def test_paused_counts_also_what_fails(clock):
  told, _ = progress(clock, io.StringIO())
  clock.now += 1.0
  with pytest.raises(ValueError), told.paused():
    clock.now += 50.0
    raise ValueError
  assert told.rates(1)["examples_per_second"] == 8.0


def test_with_each_batch_this_process_goes_on():
  with course.at("trains"):
    before = course.now()
    assert list(timing.Waiting([1, 2])) == [1, 2]
    assert course.now().batches == before.batches + 2
    assert course.now().moves == before.moves + 2


def test_rates_count_from_after_the_compilation(clock):
  told, waiting = progress(clock, io.StringIO())
  next(waiting)
  with told.paused():
    clock.now += 7.0
  clock.now += 60.0
  told.count_from(1)
  clock.now += 1.0
  assert told.rates(2) == {"examples_per_second": 8.0, "input_wait": 0.0}


def test_right_after_the_compilation_no_rate_is_known(clock):
  # A run that logs its first step.
  stream = io.StringIO()
  told, _ = progress(clock, stream)
  told.count_from(1)
  rates = told.rates(1)
  assert rates == {"examples_per_second": 0.0, "input_wait": 0.0}
  told.show(1, 2.0, rates)
  assert "left not known yet" in stream.getvalue()


def test_off_a_terminal_a_line_now_and_then(clock):
  stream = io.StringIO()
  told, _ = progress(clock, stream)
  for step in range(1, 101):
    clock.now += 1.0
    told.show(step, 3.14159, {"examples_per_second": 8.0, "input_wait": 0.1})
  told.close()
  lines = stream.getvalue().splitlines()
  assert lines[0] == ("step 1/100  loss 3.142  8 examples/s  waiting 10 %  left 1:39")
  assert [line.split()[1] for line in lines] == [
    *(f"{s}/100" for s in range(1, 100, 11)),
    "100/100",
  ][: len(lines)]
  assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_the_last_line_comes_whatever_the_time(clock):
  stream = io.StringIO()
  told, _ = progress(clock, stream)
  for step in (99, 100):
    told.show(step, 1.0, {"examples_per_second": 8.0, "input_wait": 0.0})
  assert stream.getvalue().splitlines()[-1].endswith("left 0:00")


def test_on_a_terminal_one_line_is_drawn_anew(clock):
  stream = Terminal()
  told, _ = progress(clock, stream)
  for step in (25, 50):
    told.show(step, 1.0, {"examples_per_second": 8.0, "input_wait": 0.0})
  assert stream.getvalue().count("\n") == 0
  assert stream.getvalue().count("\r") == 2
  assert "[##########..........] step 50/100" in stream.getvalue()
  told.close()
  assert stream.getvalue().endswith("\n")


def test_quiet_says_nothing(clock):
  for stream in (io.StringIO(), Terminal()):
    told, _ = progress(clock, stream, quiet=True)
    told.show(100, 1.0, {"examples_per_second": 8.0, "input_wait": 0.0})
    told.close()
    assert stream.getvalue() == ""


def test_long_runs_have_hours(clock):
  stream = io.StringIO()
  told, _ = progress(clock, stream, total=10_000)
  told.show(1, 1.0, {"examples_per_second": 8.0, "input_wait": 0.0})
  assert stream.getvalue().strip().endswith("left 2:46:39")


def test_profiler_records_its_steps(tmp_path, caplog):
  caplog.set_level(logging.INFO)
  profiler = timing.Profiler(str(tmp_path), start=2, steps=1)
  for step in range(5):
    profiler.before(step)
    jnp.add(1, step).block_until_ready()
    assert profiler._on == (step == 2)
  profiler.stop()
  assert list(tmp_path.rglob("*.xplane.pb"))
  assert caplog.text.count("profile: written to") == 1


def test_profiler_of_a_run_that_ends_first(tmp_path, monkeypatch):
  calls = []
  monkeypatch.setattr(jax.profiler, "start_trace", lambda d: calls.append("start"))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
  profiler = timing.Profiler(str(tmp_path), start=1, steps=10)
  for step in range(3):
    profiler.before(step)
  profiler.stop()
  profiler.stop()
  assert calls == ["start", "stop"]


def test_no_profiler(tmp_path, monkeypatch):
  monkeypatch.setattr(jax.profiler, "start_trace", lambda d: 1 / 0)
  profiler = timing.Profiler(str(tmp_path), start=-1, steps=0)
  for step in range(3):
    profiler.before(step)
  profiler.stop()
