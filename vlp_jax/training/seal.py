"""What a checkpoint says of itself, so that a bit that is not as it was saved shows."""

from collections.abc import Mapping
import functools
import json
from typing import Any
import zlib

import jax

from vlp_jax.ops import fingerprint


def fingerprints(flat: Mapping[str, jax.Array]) -> dict[str, str]:
  """{path: hexadecimal digits} of arrays; what is has the same bits has the same."""
  # One after the other: many small programs at once, each of which sums over devices,
  # can wait for each other for ever where devices share threads (several CPU devices).
  prints = {path: jax.block_until_ready(_print_of(x)(x)) for path, x in flat.items()}
  return {path: f"{int(number):08x}" for path, number in prints.items()}


def _print_of(x):
  place = getattr(x, "sharding", None)
  mesh = place.mesh if isinstance(place, jax.sharding.NamedSharding) else None
  return _print_on(mesh)


@functools.cache
def _print_on(mesh):
  """`fingerprint.of`, compiled, its result on every device of the mesh."""
  whole = mesh and jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return jax.jit(fingerprint.of, out_shardings=whole)


def sealed(meta: Mapping[str, Any], prints: Mapping[str, str]) -> dict[str, Any]:
  """The JSON of a checkpoint, with a checksum of itself."""
  whole = {"meta": dict(meta), "fingerprints": dict(prints)}
  return whole | {"crc32": _crc(whole)}


def opened(
  whole: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, str]]:
  """(meta, fingerprints) of what `sealed` made.

  Raises:
    OSError: it is not as it was written.
  """
  try:
    whole = dict(whole)
    if whole.pop("crc32") != _crc(whole):
      raise ValueError
    return whole["meta"], whole["fingerprints"]
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise OSError("meta is not what was saved") from error


def _crc(value):
  return zlib.crc32(json.dumps(value, sort_keys=True).encode())
