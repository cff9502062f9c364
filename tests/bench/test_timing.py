"""Turns, the best of them, and processes that take part in them."""

import sys

import pytest

from vlp_jax.bench import timing

SERVER = """
from vlp_jax.bench import timing
print("a library that talks to stdout")
timing.serve({"name": "x"}, lambda: (3.0, 2.0))
"""


def watched():
  """(names in the order in which they ran, contenders a and b)."""
  seen = []

  def contender(name):
    def run():
      seen.append(name)
      return float(len(seen)), 0.5

    return run

  return seen, {name: contender(name) for name in "ab"}


def test_all_take_turns_and_every_second_turn_is_the_other_way_round():
  seen, both = watched()
  times = timing.side_by_side(both, repeats=3)
  assert seen == ["a", "b", "a", "b", "b", "a", "a", "b"]
  assert times["a"].wall == (3.0, 6.0, 7.0)
  assert (times["a"].best, times["a"].median, times["a"].least_cpu) == (3.0, 6.0, 0.5)


def test_what_leads_a_round_does_not_count():
  seen, both = watched()
  times = timing.side_by_side(both, repeats=2, warmup=0, lead=1)
  assert seen == list("aabbbbaa")
  assert (times["a"].wall, times["b"].wall) == ((2.0, 8.0), (4.0, 6.0))


def test_a_child_describes_itself_and_runs_rounds():
  child = timing.Child(["-c", SERVER])
  assert child.about == {"name": "x"}
  assert child() == (3.0, 2.0)
  child.close()


def test_a_child_that_fails_says_why():
  with pytest.raises(ValueError, match=r"ended with 1: .*no_such_package"):
    _ = timing.Child(["-c", "import no_such_package"], python=sys.executable).about
