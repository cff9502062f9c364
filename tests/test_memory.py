"""What the allocator keeps, counted by the faults of those that allocate again."""

import platform
import subprocess
import sys

import pytest

from vlp_jax import memory

GLIBC = platform.libc_ver()[0] == "glibc"
# Faults of 200 MiB that are written when as much has just been freed, and that thrice.
AGAIN = """
import resource
from vlp_jax import memory
SIZE = 200 << 20
print(memory.keep_steps(), memory.keep_images())
for _ in range(3):
  b"x" * SIZE
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
b"x" * SIZE
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def in_a_process(monkeypatch, platforms):
  monkeypatch.setenv("JAX_PLATFORMS", platforms)
  run = [sys.executable, "-c", AGAIN]
  return subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()


def test_the_advice_is_taken_where_the_c_library_is_gnus():
  assert memory.keep_images() == GLIBC


@pytest.mark.skipif(not GLIBC, reason="another C library")
def test_what_a_step_frees_is_kept_for_the_next(monkeypatch):
  *kept, faults = in_a_process(monkeypatch, "cpu")
  assert kept == ["True", "True"]
  *kept, others = in_a_process(monkeypatch, "cuda,cpu")
  assert kept == ["False", "True"]
  assert int(faults) < 10 < 100 < int(others)


def test_it_is_too_late_once_jax_is_there():
  assert "jax" in sys.modules
  assert not memory.keep_steps()
