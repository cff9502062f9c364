"""Times of things that are measured side by side, so that all see the same machine."""

import collections
from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import types


@dataclasses.dataclass(frozen=True)
class Times:
  """Seconds of each repeat of one thing, of the clock and of all its threads' work.

  Other work on the machine only ever makes a repeat longer, so the best says most of
  the thing itself; the median says how noisy the machine was.
  """

  wall: tuple[float, ...]
  cpu: tuple[float, ...]

  @property
  def best(self) -> float:
    return min(self.wall)

  @property
  def median(self) -> float:
    return statistics.median(self.wall)

  @property
  def least_cpu(self) -> float:
    return min(self.cpu)


# Runs a thing once, and returns its (wall, cpu) seconds.
Round = Callable[[], tuple[float, float]]


def here(run: Callable[[], object], *, times: int = 1) -> Round:
  """The round of a function of this process, which returns when its work is done.

  times: that it does its work in one call; a round is one of them.
  """

  def once():
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall / times, cpu / times

  return once


def side_by_side(
  contenders: Mapping[str, Round], *, repeats: int, warmup: int = 1, lead: int = 0
) -> dict[str, Times]:
  """Runs each once in turn, so many times.

  Every second turn goes the other way round, so that nothing always follows the same.

  Args:
    lead: rounds before each one that counts, which do not. A virtual machine gives free
      memory back to its host, and the first to want it again waits for that: a step of
      CLIP that came after ten seconds of rest took a third longer.
  """
  found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
  for _ in range(warmup):
    for run in contenders.values():
      run()
  for i in range(repeats):
    for name in list(contenders) if i % 2 == 0 else list(contenders)[::-1]:
      for _ in range(lead):
        contenders[name]()
      found[name].append(contenders[name]())
  return {name: Times(*zip(*pairs, strict=True)) for name, pairs in found.items()}


# Environment variable: where a child writes, the number of a file.
ANSWERS = "VLP_JAX_BENCH_ANSWERS"


class Child:
  """A process that runs a round for every line it reads: nothing of it is in ours.

  Its first answer is one line of JSON that describes it (`about`), each other one is
  [wall, cpu]. See `serve`.
  """

  def __init__(
    self,
    argv: Sequence[str],
    *,
    python: str | None = None,
    env: Mapping[str, str] = types.MappingProxyType({}),
  ):
    """argv: `-m module …`. python: another interpreter, e.g. of a rival's packages.
    env: over ours.

    The process is not waited for: its first answer, or first round, is.
    """
    self._name = " ".join(argv)
    # Of its own: libraries print to stdout what they like.
    answers, end = os.pipe()
    self._process = subprocess.Popen(
      [python or sys.executable, *argv],
      stdin=subprocess.PIPE,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
      env=os.environ | env | {ANSWERS: str(end)},
      pass_fds=(end,),
    )
    os.close(end)
    self._answers = os.fdopen(answers)
    # Read all the time: a full pipe would stop the process.
    self._said: collections.deque[str] = collections.deque(maxlen=40)
    self._listener = threading.Thread(
      target=self._said.extend, args=(self._process.stderr,), daemon=True
    )
    self._listener.start()

  @functools.cached_property
  def about(self) -> dict[str, object]:
    """What it says of itself, once it is ready.

    Raises:
      ValueError: it ended before it was; says what it said last.
    """
    return self._answer()

  def __call__(self) -> tuple[float, float]:
    _ = self.about
    self._process.stdin.write("\n")
    self._process.stdin.flush()
    wall, cpu = self._answer()
    return wall, cpu

  def close(self) -> int:
    """Ends the process; its exit code."""
    with contextlib.suppress(BrokenPipeError):  # it is gone already
      self._process.stdin.close()
    try:
      code = self._process.wait(timeout=60)
    except subprocess.TimeoutExpired:
      # What it measured is known; it need not end well.
      self._process.kill()
      code = self._process.wait()
    self._listener.join()
    self._answers.close()
    self._process.stderr.close()
    return code

  def _answer(self):
    line = self._answers.readline()
    if not line:
      code = self.close()
      last = "".join(self._said).strip().splitlines()[-1:] or ["it said nothing"]
      raise ValueError(f"bench: {self._name} ended with {code}: {last[0]}")
    return json.loads(line)


def serve(about: Mapping[str, object], run: Round) -> None:
  """The other side of `Child`: what a process does that is one."""
  answers = os.fdopen(int(os.environ[ANSWERS]), "w")
  print(json.dumps(about), file=answers, flush=True)
  for _ in sys.stdin:
    print(json.dumps(run()), file=answers, flush=True)
