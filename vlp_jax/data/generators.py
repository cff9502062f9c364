"""`numpy.random.default_rng` of many seeds at once, at a fifth of the time of each.

numpy promises that SeedSequence and PCG64 never change (NEP 19), and `test_generators`
holds these against it.
"""

from collections.abc import Iterator, Sequence

import numpy as np

# numpy/random/bit_generator.pyx, after M.E. O'Neill's seed_seq_fe; a pool of 4 words.
POOL = 4
INIT_A, MULT_A = 0x43B0D7E5, 0x931E8875
INIT_B, MULT_B = 0x8B51F9DD, 0x58F38DED
MIX_L, MIX_R = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)
SHIFT = np.uint32(16)
WORD = 2**32 - 1
# numpy/random/src/pcg64: the step of its 128-bit state.
STEP, STATE = 0x2360ED051FC65DA44385DF649FCCF645, 2**128 - 1


def default_rngs(
  first: int, numbers: np.ndarray, last: int
) -> Iterator[np.random.Generator]:
  """`default_rng((first, number, last))` for each number, one after the other.

  It is one generator that is seeded anew: use it before the next is asked for.

  Args:
    first, last: 0 or more. numbers: int64 [n], 0 or more.
  """
  bits = np.random.PCG64(0)
  rng = np.random.Generator(bits)
  # A number of more than 32 bits is two words, and the seed another.
  numbers = np.asarray(numbers, np.int64)
  wide = numbers > WORD
  states = np.empty((len(numbers), 4), np.uint64)
  for words, which in ((1, ~wide), (2, wide)):
    chosen = numbers[which].astype(np.uint64)
    if len(chosen):
      middle = [(chosen >> np.uint64(32 * i)).astype(np.uint32) for i in range(words)]
      states[which] = _states([*_words(first), *middle, *_words(last)], len(chosen))
  for high, low, stream_high, stream_low in states.tolist():
    increment = ((stream_high << 64 | stream_low) << 1 | 1) & STATE
    start = ((increment + (high << 64 | low)) * STEP + increment) & STATE
    bits.state = {
      "bit_generator": "PCG64",
      "state": {"state": start, "inc": increment},
      "has_uint32": 0,
      "uinteger": 0,
    }
    yield rng


def _words(number):
  """The words of 32 bits of a number, the lowest first."""
  words = [np.uint32(number & WORD)]
  while number := number >> 32:
    words.append(np.uint32(number & WORD))
  return words


def _states(entropy: Sequence, count: int) -> np.ndarray:
  """uint64 [n, 4], `SeedSequence(entropy).generate_state(4, uint64)` of each.

  entropy: words, uint32 [n], or one that all share.
  """
  mixed = _Hash(INIT_A, MULT_A)
  zero = np.zeros(count, np.uint32)
  words = [zero | word for word in entropy]
  words += [zero] * (POOL - len(words))
  pool = [mixed(word) for word in words[:POOL]]
  for source in range(POOL):
    for to in range(POOL):
      if source != to:
        pool[to] = _mix(pool[to], mixed(pool[source]))
  for word in words[POOL:]:
    for to in range(POOL):
      pool[to] = _mix(pool[to], mixed(word))
  drawn = _Hash(INIT_B, MULT_B)
  made = np.stack([drawn(pool[i % POOL]) for i in range(2 * POOL)], axis=1)
  low, high = made[:, ::2].astype(np.uint64), made[:, 1::2].astype(np.uint64)
  return high << np.uint64(32) | low


class _Hash:
  """A hash of words whose constant moves on with each call."""

  def __init__(self, constant: int, factor: int):
    self._constant, self._factor = constant, factor

  def __call__(self, words):
    words = words ^ np.uint32(self._constant)
    self._constant = self._constant * self._factor & WORD
    words = words * np.uint32(self._constant)
    return words ^ words >> SHIFT


def _mix(x, y):
  mixed = x * MIX_L - y * MIX_R
  return mixed ^ mixed >> SHIFT
