"""Where compiled programs are kept."""

import jax
import pytest

from vlp_jax.training import cache


@pytest.fixture
def unset(monkeypatch, tmp_path):
  """As in a user's process: no folder is set; put back afterwards."""
  names = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_enable_compilation_cache",
  )
  before = {name: getattr(jax.config, name) for name in names}
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  jax.config.update("jax_compilation_cache_dir", None)
  yield tmp_path
  for name, value in before.items():
    jax.config.update(name, value)


def test_programs_are_kept_for_the_user(unset):
  folder = cache.use()
  assert folder == str(cache.default()) == jax.config.jax_compilation_cache_dir
  assert cache.default().is_dir()
  assert cache.default().is_relative_to(unset / "vlp_jax")
  assert jax.__version__ in cache.default().name


def test_what_is_set_already_stays(unset):
  own = str(unset / "own")
  jax.config.update("jax_compilation_cache_dir", own)
  assert cache.use() == own == jax.config.jax_compilation_cache_dir


def test_nothing_is_kept_where_that_is_said_or_cannot_be(unset, monkeypatch):
  jax.config.update("jax_enable_compilation_cache", False)
  assert cache.use() is None
  jax.config.update("jax_enable_compilation_cache", True)
  (unset / "file").write_text("")
  monkeypatch.setenv("XDG_CACHE_HOME", str(unset / "file"))
  assert cache.use() is None
  assert jax.config.jax_compilation_cache_dir is None


def test_another_processor_has_another_folder(unset, monkeypatch):
  here = cache.default()
  monkeypatch.setattr(cache, "instructions", lambda: "flags: none")
  assert cache.default() != here
