"""What `bench contrastive` compares is one loss; what it shows of measurements."""

import json

import jax
import numpy as np
import pytest

from vlp_jax.bench import contrastive

ROWS = [
  dict(kind="plain", batch=1024, temporary_bytes=4_200_000, seconds=0.5),
  dict(kind="ring", batch=1024, temporary_bytes=900_000, seconds=0.25),
  dict(kind="plain", batch=4096, error="out of memory"),
  dict(kind="ring", batch=4096, temporary_bytes=3_600_000_000),
]


def test_all_manners_make_one_loss_and_one_gradient():
  auto = (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.make_mesh(
    (4, 1), contrastive.AXES, devices=jax.devices()[:4], axis_types=auto
  )
  rng = np.random.default_rng(0)
  z = rng.normal(size=(2, 16, 8)).astype(np.float32)
  z = z / np.linalg.norm(z, axis=2, keepdims=True)
  ids = np.arange(16, dtype=np.int32)
  found = {}
  with jax.set_mesh(mesh):
    for kind in contrastive.KINDS:
      loss = contrastive.loss_of(kind, tile=3)
      step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
      found[kind] = jax.tree.leaves(jax.tree.map(np.asarray, step(*z, ids)))
  for kind in ("gathered", "ring"):
    for got, want in zip(found[kind], found["plain"], strict=True):
      scale = np.abs(want).max()
      np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * scale, err_msg=kind)


def test_the_table_says_what_was_measured_and_what_was_not():
  assert contrastive.table(ROWS).splitlines() == [
    "| batch | plain: MB planned | ring: MB planned | plain: s | ring: s |",
    "|---|---|---|---|---|",
    "| 1,024 | 4.20 | 0.900 | 0.500 | 0.250 |",
    "| 4,096 | – | 3,600 | – | – |",
  ]


def test_a_plot_is_made(tmp_path):
  contrastive.plot(ROWS, tmp_path / "x.png")
  assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_kind_that_there_is_not():
  with pytest.raises(ValueError, match="--kinds=rnig: there are plain, gathered, ring"):
    contrastive.main(["--kinds=rnig"])


@pytest.mark.slow
def test_measurements_are_stored(tmp_path):
  out = tmp_path / "contrastive.json"
  flags = ["--most=256", "--least=128", "--factor=2", "--most-run=128", "--repeats=1"]
  contrastive.main([*flags, "--devices=2", "--width=8", f"--out={out}"])
  found = json.loads(out.read_text())
  assert len(found["rows"]) == 6 and found["devices"] == 2
  for row in found["rows"]:
    assert row["temporary_bytes"] > 0
    assert ("seconds" in row) == (row["batch"] == 128)
