"""Programs of the last start, loaded ahead: handed out for their own keys alone."""

import inspect
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
from jax._src import compilation_cache
from jax._src.lib import xla_client
import pytest

from vlp_jax.training import ahead

ROOT = pathlib.Path(__file__).parents[2]
# Compiles two programs in a start, of which the second depends on the argument; says
# what JAX's own function was asked for, and from which thread.
START = """
  import sys, threading
  import jax
  from jax._src import compilation_cache
  from vlp_jax.training import ahead, cache
  plain, main = compilation_cache.get_executable_and_time, threading.main_thread()

  def told(key, *args):
    found = plain(key, *args)
    where = "main" if threading.current_thread() is main else "ahead"
    line = (key.split("-")[0], where, "found" if found[0] is not None else "none")
    sys.stdout.write(" ".join(line) + chr(10))  # At once: two threads write.
    return found

  compilation_cache.get_executable_and_time = told
  ahead.LEAST_SECONDS = 0.0
  x = jax.device_put(1.0)
  with ahead.Programs(cache.use(), "a config") as programs:
    for _, _, made in programs._coming.values():
      made.result()

    @jax.jit
    def first(x):
      return x * 2 + 1

    @jax.jit
    def second(x):
      return x * float(sys.argv[1]) + 1

    assert first(x) == 3 and second(x) == float(sys.argv[1]) + 1
    programs.end()
    assert compilation_cache.get_executable_and_time is told
    assert jax.jit(lambda x: x - 1)(x) == 0
"""


def start(folder, factor):
  """Lines of what was asked for."""
  own = dict(
    JAX_COMPILATION_CACHE_DIR=str(folder),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
    JAX_PLATFORMS="cpu",
    PYTHONPATH=str(ROOT),
  )
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(START), str(factor)],
    env=os.environ | own,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  return [line for line in lines if line.startswith(("jit_first", "jit_second"))]


def test_programs_of_the_last_start_are_loaded_ahead(tmp_path):
  assert start(tmp_path, 2) == ["jit_first main none", "jit_second main none"]
  assert start(tmp_path, 2) == ["jit_first ahead found", "jit_second ahead found"]
  # Another program than last time: what was loaded for it is not taken.
  loaded = ["jit_first ahead found", "jit_second ahead found"]
  assert start(tmp_path, 3) == [*loaded, "jit_second main none"]
  (file,) = tmp_path.glob("ahead-*.json")
  names = [key.split("-")[0] for key in json.loads(file.read_text())]
  assert names.count("jit_first") == names.count("jit_second") == 1


def test_what_jax_has_in_private_is_as_it_is_used_here():
  names = list(inspect.signature(compilation_cache.get_executable_and_time).parameters)
  wanted = ["cache_key", "compile_options", "backend", "executable_devices"]
  assert names[:4] == wanted and set(names[4:]) <= {"host_callbacks"}
  assert hasattr(xla_client.CompileOptions, "ParseFromString")
  assert hasattr(xla_client, "DeviceList")


class Options:
  def __init__(self, said=b"options"):
    self.said = said

  def SerializeAsString(self):
    return self.said


@pytest.fixture
def jaxs(monkeypatch):
  """JAX's function, which finds every program; (key, thread's) calls of it."""
  calls = []

  def plain(key, options, backend, devices, *more):
    del options, backend, devices, more
    calls.append(key)
    return (None, None) if key.startswith("unknown") else (f"program of {key}", 1)

  monkeypatch.setattr(compilation_cache, "get_executable_and_time", plain)
  monkeypatch.setattr(
    xla_client.CompileOptions, "ParseFromString", lambda said: Options(said)
  )
  monkeypatch.setattr(ahead, "LEAST_SECONDS", 0.0)
  return calls


def get(key, options=None, devices=None, *more):
  devices = jax.devices()[:1] if devices is None else devices
  ask = compilation_cache.get_executable_and_time
  return ask(key, options or Options(), None, devices, *more)[0]


def wait(programs):
  for _, _, made in programs._coming.values():
    made.result()


def test_other_options_or_devices_are_not_what_was_loaded(tmp_path, jaxs):
  with ahead.Programs(str(tmp_path), "config"):
    assert [get("a"), get("b"), get("c")] == [f"program of {k}" for k in "abc"]
  assert jaxs == ["a", "b", "c"]
  jaxs.clear()
  with ahead.Programs(str(tmp_path), "config") as programs:
    wait(programs)
    assert sorted(jaxs) == ["a", "b", "c"]
    jaxs.clear()
    assert get("a") == "program of a"
    assert not jaxs
    get("b", Options(b"others"))
    get("c", None, jax.devices()[1:2])
    get("a")  # It is handed out once.
    assert jaxs == ["b", "c", "a"]


def test_a_program_with_callbacks_is_not_what_was_loaded(tmp_path, jaxs):
  with ahead.Programs(str(tmp_path), "config"):
    get("a")
  with ahead.Programs(str(tmp_path), "config") as programs:
    wait(programs)
    jaxs.clear()
    get("a", None, None, ["a callback"])
    assert jaxs == ["a"]


def test_another_config_begins_otherwise(tmp_path, jaxs):
  with ahead.Programs(str(tmp_path), "config"):
    get("a")
  with ahead.Programs(str(tmp_path), "other") as programs:
    assert not programs._coming


def test_what_is_gone_from_the_cache_is_asked_for_again(tmp_path, jaxs):
  with ahead.Programs(str(tmp_path), "config"):
    assert get("unknown") is None
  with ahead.Programs(str(tmp_path), "config") as programs:
    wait(programs)
    jaxs.clear()
    assert get("unknown") is None
    assert jaxs == ["unknown"]


def test_a_file_that_is_broken_or_cannot_be_written_is_no_matter(tmp_path, jaxs):
  programs = ahead.Programs(str(tmp_path), "config")
  programs._file.write_text("{")
  with programs:
    assert get("a") == "program of a"
  assert list(json.loads(programs._file.read_text())) == ["a"]
  with ahead.Programs(str(tmp_path / "none" / "there"), "config"):
    assert get("a") == "program of a"
  assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("folder", [None, "gs://bucket/programs"])
def test_without_a_folder_of_a_disk_nothing_is_watched(folder, jaxs):
  before = compilation_cache.get_executable_and_time
  with ahead.Programs(folder, "config"):
    assert compilation_cache.get_executable_and_time is before


def test_of_several_processes_nothing_is_watched(tmp_path, jaxs, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  before = compilation_cache.get_executable_and_time
  with ahead.Programs(str(tmp_path), "config"):
    assert compilation_cache.get_executable_and_time is before


def test_an_error_of_the_start_puts_jaxs_function_back(tmp_path, jaxs):
  before = compilation_cache.get_executable_and_time
  with pytest.raises(ValueError, match="a mistake"):
    with ahead.Programs(str(tmp_path), "config"):
      raise ValueError("a mistake")
  assert compilation_cache.get_executable_and_time is before


def test_a_start_that_fails_leaves_what_the_last_one_wrote(tmp_path, jaxs):
  with ahead.Programs(str(tmp_path), "config") as programs:
    get("a")
    get("b")
  written = programs._file.read_text()
  with pytest.raises(ValueError, match="a mistake"):
    with ahead.Programs(str(tmp_path), "config"):
      get("a")
      raise ValueError("a mistake")
  assert programs._file.read_text() == written
