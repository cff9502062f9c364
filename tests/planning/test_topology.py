"""Names of hardware: what they mean, and what is said of wrong ones."""

import importlib.util

import jax
import pytest

from vlp_jax import card as card_lib
from vlp_jax.planning import hardware
from vlp_jax.planning import topology as topology_lib


@pytest.mark.parametrize(
  ("name", "devices", "platform"),
  [
    ("v5e:16x16", 256, "tpu"),
    ("v4:4x4x8", 128, "tpu"),
    ("v5p:8x8x16", 1024, "tpu"),
    ("v5p:4x8x12", 384, "tpu"),
    ("V6E:1x1", 1, "tpu"),
    ("h100:8", 8, "gpu"),
    ("h200:1", 1, "gpu"),
    ("a100-40gb:16", 16, "gpu"),
    ("cpu:3", 3, "cpu"),
  ],
)
def test_names(name, devices, platform):
  found = topology_lib.parse(name)
  assert (found.devices, found.platform) == (devices, platform)
  assert found.name == name.lower()


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("v5e:3x5", r"no slice of v5e; the nearest is v5e:4x4\. There are: 1x1, 2x2"),
    ("v5e:256", r"the nearest is v5e:16x16"),
    ("v4:4x4", r"the nearest is v4:2x2x4\..*multiples of 4"),
    ("v5e", r"no slice of v5e"),
    ("h1000:8", r"no such hardware; did you mean 'h100'\? There are: v4:"),
    ("h100:12", r"the nearest is h100:16"),
    ("h100:x", r"want 1, 2, 4, 8 or a multiple of 8 behind the colon"),
    ("cpu:0", r"want a number, as in cpu:8"),
  ],
)
def test_wrong_names_are_told_the_nearest(name, said):
  with pytest.raises(ValueError, match=said):
    topology_lib.parse(name)


@pytest.mark.parametrize(
  ("name", "said"),
  [("v5e:4x4", r'no libtpu.*pip install.*"jax\[tpu\]"'), ("h100:8", r"no CUDA plugin")],
)
def test_a_compiler_that_is_not_installed(name, said, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=said):
    topology_lib.prepare(topology_lib.parse(name))


def test_devices_of_the_cpu():
  assert len(jax.devices()) == 8  # JAX has begun, with those that all tests share.
  assert len(topology_lib.devices(topology_lib.parse("cpu:4"))) == 4
  with pytest.raises(ValueError, match="begun with 8 CPU devices"):
    topology_lib.devices(topology_lib.parse("cpu:9"))


def test_chips_are_whole():
  for name, chip in hardware.CHIPS.items():
    assert 0.5 * chip.memory < chip.usable < chip.memory, name
    assert set(chip.flops) == {"half", "single", "single_high", "double"}, name
    assert chip.flops["single_high"] < chip.flops["half"], name
    assert (chip.platform == "gpu") == (chip.gpu is not None) == bool(chip.network)
  target = hardware.CHIPS["h200"].gpu.target(memory=141, bandwidth=48)
  for line in ("core_count: 132", "memory_bandwidth: 48", "major: 9 minor: 0"):
    assert line in target


def test_every_baseline_has_a_slice():
  for name, card, _ in card_lib.baselines(card_lib.folder()):
    assert topology_lib.parse(card.slice).platform != "cpu", name


@pytest.mark.parametrize(
  ("kind", "name"),
  [
    # As jax said on such a machine.
    ("NVIDIA H200", "h200"),
    ("NVIDIA H100 80GB HBM3", "h100"),
    ("NVIDIA H100 PCIe", None),
    ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
    ("TPU v5 lite", "v5e"),
    ("TPU v5", "v5p"),
    ("cpu", None),
  ],
)
def test_what_jax_calls_a_chip(kind, name):
  assert hardware.called(kind) == name


def test_every_chip_has_a_name_of_jax():
  assert set(hardware.NAMES.values()) == set(hardware.CHIPS)
