"""Position tables, against the official ALBEF and against slow numpy."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from vlp_jax.ops import posembed

REFERENCE = pathlib.Path(__file__).parents[1] / "reference" / "posembed" / "albef.npz"


@pytest.mark.parametrize("grid", [3, 6, 9])
def test_resize_is_that_of_official_albef(grid):
  arrays = np.load(REFERENCE)
  got = posembed.resize_posembed(arrays["table_4x4"][0], grid)
  want = arrays[f"resized_{grid}x{grid}"][0]
  # float32 here and there; the order of sums differs.
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_resize_keeps_prefix_dtype_and_same_grid():
  table = jnp.arange(18 * 4, dtype=jnp.bfloat16).reshape(18, 4)
  got = posembed.resize_posembed(table, 5, prefix=2)
  assert got.shape == (27, 4) and got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got[:2], table[:2])
  assert posembed.resize_posembed(table, 4, prefix=2) is table
  assert posembed.resize_posembed(table[2:], 2, prefix=0).shape == (4, 4)


@pytest.mark.parametrize("new", [3, 4, 7, 9])
def test_antialiased_resize(new):
  """Against jax's own cubic kernel, and torch's where it is installed."""
  table = np.random.default_rng(0).normal(size=(2 + 49, 4)).astype(np.float32)
  got = posembed.resize_posembed(table, new, prefix=2, how="antialiased")
  np.testing.assert_array_equal(got[:2], table[:2])
  grid = table[2:].reshape(7, 7, 4)
  want = jax.image.resize(grid, (new, new, 4), "cubic", antialias=True)
  got = np.asarray(got[2:]).reshape(new, new, 4)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("new", [3, 9])
def test_corners_stay_corners(new):
  """big_vision's own call."""
  table = np.random.default_rng(0).normal(size=(49, 4)).astype(np.float32)
  zoom = (new / 7, new / 7, 1)
  want = scipy.ndimage.zoom(table.reshape(7, 7, 4), zoom, order=1)
  got = posembed.resize_posembed(table, new, prefix=0, how="corners")
  np.testing.assert_allclose(got, want.reshape(-1, 4), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("new", [3, 9])
def test_resizing_is_that_of_torch(new):
  torch = pytest.importorskip("torch")
  table = np.random.default_rng(0).normal(size=(49, 4)).astype(np.float32)
  grid = torch.tensor(table.reshape(1, 7, 7, 4)).permute(0, 3, 1, 2)
  for antialias in (False, True):
    want = torch.nn.functional.interpolate(
      grid, size=(new, new), mode="bicubic", align_corners=False, antialias=antialias
    )
    how = "antialiased" if antialias else "bicubic"
    got = posembed.resize_posembed(table, new, prefix=0, how=how)
    want = want.permute(0, 2, 3, 1).reshape(new**2, 4).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_resize_is_linear_and_traceable():
  table = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
  resize = jax.jit(lambda x: posembed.resize_posembed(x, 5, prefix=0))
  np.testing.assert_allclose(resize(2 * table), 2 * resize(table), rtol=1e-5)
  # The weights of a sample sum to one: a constant table stays constant.
  np.testing.assert_allclose(resize(np.ones_like(table)), 1.0, rtol=1e-6)


@pytest.mark.parametrize("rows, prefix", [(11, 1), (1, 1), (0, 1)])
def test_resize_refuses_tables_of_no_square_grid(rows, prefix):
  with pytest.raises(ValueError, match=f"{rows} rows"):
    posembed.resize_posembed(np.zeros((rows, 4)), 3, prefix=prefix)


def test_sincos2d_entry_by_entry():
  got = posembed.sincos2d(3, 8)
  assert got.shape == (9, 8) and got.dtype == np.float32
  for y in range(3):
    for x in range(3):
      for i in range(2):
        omega = 1 / 10_000 ** (i / 2)
        row = got[3 * y + x]
        want = [
          np.sin(x * omega),
          np.cos(x * omega),
          np.sin(y * omega),
          np.cos(y * omega),
        ]
        np.testing.assert_allclose(row[i::2], want, atol=1e-6)
  with pytest.raises(ValueError, match="multiple of 4"):
    posembed.sincos2d(3, 6)


def test_sincos1d_entry_by_entry():
  got = posembed.sincos1d(5, 6)
  assert got.shape == (5, 6) and got.dtype == np.float32
  for at in range(5):
    for i in range(3):
      angle = at / 100 ** (i / 3)
      want = np.array([np.sin(angle), np.cos(angle)]) / 3**0.5
      np.testing.assert_allclose(got[at, i::3], want, atol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1.0, rtol=1e-6)
  # What lies one back is the same turn of every position.
  near = got @ got.T
  np.testing.assert_allclose(np.diag(near, 1), near[0, 1], rtol=1e-5)
  with pytest.raises(ValueError, match="even width, not 5"):
    posembed.sincos1d(3, 5)
