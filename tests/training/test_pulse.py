"""Who lives and who goes on, by a clock that the test sets."""

import pytest

from vlp_jax.training import pulse as pulse_lib


@pytest.fixture
def clock(monkeypatch):
  """A list of one number: now."""
  now = [100]
  monkeypatch.setattr(pulse_lib.time, "monotonic", lambda: now[0])
  return now


def test_whoever_hung_itself_blames_nobody(clock):
  pulse = pulse_lib.Pulse([1, 2], 8.0)
  assert pulse.every == 2.0
  for clock[0] in range(102, 108, 2):
    pulse.hear(1)
    assert pulse.speak() and not pulse.speak()
    assert not pulse.overslept() and pulse.silent() is None
  clock[0] = 300  # it was stopped, and heard nothing
  assert pulse.overslept() and pulse.silent() is None
  for clock[0] in range(302, 310, 2):
    pulse.hear(2)
    assert not pulse.overslept() and pulse.silent() is None
  clock[0] = 309
  assert pulse.silent() == (1, 9)
  pulse.forget(1)
  assert pulse.silent() is None


def test_without_a_limit_nobody_speaks(clock):
  pulse = pulse_lib.Pulse([1], 0.0)
  clock[0] = 10_000
  assert pulse.every is None and not pulse.speak() and pulse.silent() is None


def test_turns(clock):
  turns = pulse_lib.Turns(2, 60.0)
  clock[0] = 500
  assert turns.stand_still() is None  # nobody trains yet
  turns.tell(0, 3)
  turns.tell(1, 3)
  for clock[0] in range(500, 561, 20):
    turns.tell(0, 4)
    turns.tell(1, 3)
    assert turns.stand_still() is None
  clock[0] = 561
  assert turns.stand_still() == ({0: 4, 1: 3}, 61)
  turns.tell(1, None)  # it saves
  assert turns.stand_still() is None
  clock[0] = 700
  turns.tell(1, 3)
  assert turns.stand_still() is None
  clock[0] = 761
  assert turns.stand_still() == ({0: 4, 1: 3}, 61)
  turns.begin_anew()
  assert turns.stand_still() is None
  clock[0] = 822
  assert turns.stand_still() == ({0: 4, 1: 3}, 61)
  turns.tell(1, 4)
  assert turns.stand_still() is None


def test_turns_without_a_limit(clock):
  turns = pulse_lib.Turns(1, 0.0)
  turns.tell(0, 1)
  clock[0] = 10_000
  assert turns.stand_still() is None
