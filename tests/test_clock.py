"""Durations, in steps."""

import pytest

from vlp_jax import clock as clock_lib


@pytest.mark.parametrize(
  ("duration", "expected"),
  [
    (0, 0),
    (300, 300),
    ("300 steps", 300),
    ("1 step", 1),
    ("2 epochs", 20),  # 1,003 examples of batches of 100
    ("0.1 epochs", 1),
    ("0.5 epochs", 5),
    ("1_000 examples", 10),
    ("1e6 examples", 10_000),
    ("1 example", 1),  # something, however short
    ("0 epochs", 0),
    ("5%", 10),
    ("0.1%", 1),
    ("100 %", 200),
  ],
)
def test_steps(duration, expected):
  clock = clock_lib.Clock(batch_size=100, epoch_size=1003, total=200)
  assert clock.steps(duration) == expected


@pytest.mark.parametrize("duration", [-1, 1.5, True, None, "", "3", "3 weeks", "5%s"])
def test_no_durations(duration):
  with pytest.raises(ValueError, match="is no duration: write 300"):
    clock_lib.Clock(batch_size=1, epoch_size=1, total=1).steps(duration)


def test_the_total_is_no_share_of_itself():
  with pytest.raises(ValueError, match="total='5%'"):
    clock_lib.Clock(batch_size=1, epoch_size=1).steps("5%")
