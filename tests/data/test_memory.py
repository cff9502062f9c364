"""The advice to the allocator."""

import platform

from vlp_jax.data import memory


def test_glibc_takes_the_advice_and_others_are_left_alone():
  assert memory.keep() == (platform.libc_ver()[0] == "glibc")
