"""Signals become a flag; a second one acts; handlers are put back."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from vlp_jax.training import preemption


@pytest.fixture(autouse=True)
def default_handlers():
  """Started in a shell's background, this process ignores SIGINT."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", preemption.Stop.SIGNALS)
def test_the_first_signal_is_a_flag(number):
  before = {s: signal.getsignal(s) for s in preemption.Stop.SIGNALS}
  with preemption.Stop() as stop:
    assert stop.asked is None
    os.kill(os.getpid(), number)
    assert stop.asked == signal.Signals(number).name
  assert {s: signal.getsignal(s) for s in preemption.Stop.SIGNALS} == before


def test_a_second_signal_acts():
  with preemption.Stop() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.asked == "SIGINT"
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
  ("first", "second", "code"),
  [
    ("SIGTERM", "SIGTERM", -signal.SIGTERM),
    ("SIGINT", "SIGTERM", -signal.SIGTERM),
    ("SIGTERM", "SIGINT", -signal.SIGINT),
  ],
)
def test_a_second_signal_acts_whichever_came_first(first, second, code):
  # A machine sends SIGTERM to a run that somebody has just pressed Ctrl-C in.
  script = f"""
    import os, signal
    from vlp_jax.training import preemption
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with preemption.Stop() as stop:
      os.kill(os.getpid(), signal.{first})
      assert stop.asked == "{first}"
      os.kill(os.getpid(), signal.{second})
    print("went on")
  """
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
  )
  assert done.returncode == code
  assert "went on" not in done.stdout


def test_handlers_are_restored_after_an_error():
  before = {s: signal.getsignal(s) for s in preemption.Stop.SIGNALS}
  with pytest.raises(ValueError), preemption.Stop() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.asked
    raise ValueError
  assert {s: signal.getsignal(s) for s in preemption.Stop.SIGNALS} == before
