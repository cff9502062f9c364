"""What the allocator keeps, and how a command asks for pages of 2 MiB."""

import os
import platform
import subprocess
import sys

import pytest

from vlp_jax import memory

GLIBC = platform.libc_ver()[0] == "glibc"
# A command of this package, as far as `huge_pages` can see: what it was given, whether
# it has the pages, and how many times a page of 200 MiB that are written was missing.
COMMAND = """
import resource, sys
sys.argv[0] = "vlp-jax"
from vlp_jax import memory
has = memory.huge_pages()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
b"x" * (200 << 20)
print(has, sys.argv[1:], resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def in_a_process(monkeypatch, platforms, tunables=None):
  monkeypatch.setenv("JAX_PLATFORMS", platforms)
  monkeypatch.delenv(memory.TUNABLES, raising=False)
  if tunables is not None:
    monkeypatch.setenv(memory.TUNABLES, tunables)
  run = [sys.executable, "-c", COMMAND, "one argument", "--two"]
  said = subprocess.run(run, capture_output=True, text=True, check=True).stdout
  has, _, rest = said.strip().partition(" ")
  given, _, faults = rest.rpartition(" ")
  assert given == "['one argument', '--two']"
  return has == "True", int(faults)


def test_the_advice_is_taken_where_the_c_library_is_gnus():
  assert memory.keep_images() == GLIBC


@pytest.mark.skipif(not memory.asks(), reason="pages of 2 MiB are not there to ask for")
def test_a_command_on_a_cpu_starts_again_with_large_pages(monkeypatch):
  has, faults = in_a_process(monkeypatch, "cpu")
  has_not, others = in_a_process(monkeypatch, "cuda,cpu")
  assert has and not has_not
  assert faults < 2_000 < 40_000 < others


def test_what_the_user_has_tuned_is_left_alone(monkeypatch):
  has, _ = in_a_process(monkeypatch, "cpu", "glibc.malloc.check=0")
  assert not has


def test_another_program_is_not_started_again():
  # This one, which has imported jax, too.
  assert "jax" in sys.modules
  assert not memory.huge_pages()


def test_others_processes_get_what_they_would_without_us(monkeypatch):
  monkeypatch.setenv(memory.TUNABLES, memory.HUGE)
  assert memory.huge_pages()
  run = [sys.executable, "-c", "import os; print(os.environ['GLIBC_TUNABLES'])"]
  env = os.environ | memory.as_it_comes()
  done = subprocess.run(run, env=env, capture_output=True, text=True, check=True)
  assert done.stdout == "\n"
