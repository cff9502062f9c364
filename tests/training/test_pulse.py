"""Who lives and who goes on, by a clock that the test sets."""

import pytest

from vlp_jax.training import course
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


def trains(moves, **more):
  return course.Doing("trains", moves=moves, batches=moves, **more)


def test_all_train_and_none_gets_another_batch(clock):
  turns = pulse_lib.Turns(2, 60.0)
  clock[0] = 500
  assert turns.stand_still() is None  # nobody has said anything yet
  turns.tell(0, trains(3))
  turns.tell(1, trains(3))
  for clock[0] in range(500, 561, 20):
    turns.tell(0, trains(4))
    turns.tell(1, trains(3))
    assert turns.stand_still() is None
  clock[0] = 561
  still = turns.stand_still()
  assert (still.last, still.seconds) == (1, 61)
  # What was said when the clock was 560.
  assert still.doing == {0: trains(4, seconds=1), 1: trains(3, seconds=1)}
  assert str(still) == (
    "nobody has gone on for 61 s; for 1 s it trains (3 batches so far), process 0"
    " trains (4 batches so far): do its data come?"
  )
  turns.begin_anew()
  assert turns.stand_still() is None
  clock[0] = 622
  assert turns.stand_still().seconds == 61
  turns.tell(1, trains(4))
  assert turns.stand_still() is None
  clock[0] = 683
  assert str(turns.stand_still()).endswith(
    "is it the devices, the network, or the disk?"
  )


def test_whoever_starts_takes_as_long_as_it_likes(clock):
  turns = pulse_lib.Turns(2, 60.0)
  for clock[0] in range(100, 10_000, 20):
    turns.tell(0, trains(3))
    turns.tell(1, course.START)  # it compiles
    assert turns.stand_still() is None
  # And only then the time begins.
  turns.tell(1, trains(2))
  clock[0] += 60
  assert turns.stand_still() is None
  clock[0] += 1
  assert turns.stand_still().last == 1


def test_a_long_evaluation_that_goes_on(clock):
  turns = pulse_lib.Turns(2, 60.0)
  for clock[0] in range(100, 10_000, 20):
    got = clock[0] // 50  # another batch in 50 seconds
    doing = course.Doing(
      "evaluates", "test", seconds=clock[0] - 100, batches=got, moves=7 + got
    )
    turns.tell(0, doing)
    turns.tell(1, course.Doing("evaluates", "test", batches=9, moves=16))
    assert turns.stand_still() is None
  for clock[0] in range(10_000, 10_080, 20):
    turns.tell(0, doing)
  # Process 1 is behind: its reader, say, does not return.
  assert turns.stand_still().last == 1
  assert str(turns.stand_still()).endswith(
    "it evaluates test (9 batches so far), process 0 evaluates test (199 batches so"
    " far): do its data come?"
  )


def saves(moves=9, **more):
  return course.Doing("saves", "step 40", moves=moves, seconds=3.0, **more)


@pytest.mark.parametrize(
  ("doing", "last"),
  [
    # It has not come as far as the others: they are beyond the save.
    ([trains(10), trains(10), saves()], 2),
    ([course.Doing("evaluates", "a", moves=11), saves(), trains(12)], 1),
    # All save, and the others wait for one, or one for all the others.
    ([saves(waits=True), saves(), saves(waits=True)], 1),
    ([saves(), saves(waits=True), saves()], 0),
    # The others wait for what it writes beside.
    ([saves(), saves(writes="step 30"), saves()], 1),
    ([saves(), saves(writes="step 30"), saves(writes="step 30")], 1),
    # Whoever has come less far, though it waits.
    ([saves(10), saves(9, waits=True), saves(10)], 1),
    ([saves()] * 3, 0),
  ],
)
def test_who_is_waited_for(clock, doing, last):
  turns = pulse_lib.Turns(3, 60.0)
  for index, each in enumerate(doing):
    turns.tell(index, each)
  clock[0] = 161
  assert turns.stand_still().last == last


def test_what_is_said_of_many(clock):
  turns = pulse_lib.Turns(9, 60.0)
  for index in range(9):
    turns.tell(index, saves(waits=index != 3, writes="step 30" if index == 3 else ""))
  clock[0] = 161
  assert str(turns.stand_still()) == (
    "nobody has gone on for 61 s; for 64 s it saves step 40 and has not written its"
    " part of step 30, processes 0, 1, 2, 4 and 4 more: saves step 40 and waits for"
    " others: does its disk or its store answer?"
  )


def test_whoever_has_ended_waits_for_the_others(clock):
  turns = pulse_lib.Turns(3, 60.0)
  for index in range(3):
    turns.tell(index, saves())
  clock[0] = 150
  turns.forget(0)
  turns.forget(1)
  clock[0] = 210
  assert turns.stand_still() is None
  clock[0] = 211
  still = turns.stand_still()
  assert still.last == 2 and list(still.doing) == [2]
  # As one process that is alone.
  assert str(still) == (
    "nobody has gone on for 61 s; for 114 s it saves step 40: does its disk or its"
    " store answer?"
  )
  turns.forget(2)
  clock[0] = 10_000
  assert turns.stand_still() is None


def test_turns_without_a_limit(clock):
  turns = pulse_lib.Turns(1, 0.0)
  turns.tell(0, trains(1))
  clock[0] = 10_000
  assert turns.stand_still() is None
