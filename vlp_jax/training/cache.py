"""Keeps compiled programs between runs, so that the second start is a quick one."""

import hashlib
import os
import pathlib
import platform

import jax

# A program that took less to compile is not worth a file.
LEAST_SECONDS = 0.1


def use() -> str | None:
  """Has jax keep its programs; to be called before anything is compiled.

  In the folder of JAX_COMPILATION_CACHE_DIR, or of the user: ~/.cache/vlp_jax/programs
  (XDG_CACHE_HOME). JAX_ENABLE_COMPILATION_CACHE=0 keeps nothing.

  Returns:
    The folder; None where nothing is kept.
  """
  if not jax.config.jax_enable_compilation_cache:
    return None
  if jax.config.jax_compilation_cache_dir is None:
    folder = default()
    try:
      folder.mkdir(parents=True, exist_ok=True)
    except OSError:
      return None  # No home that can be written to: the run does without.
    jax.config.update("jax_compilation_cache_dir", str(folder))
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
  return jax.config.jax_compilation_cache_dir


def default() -> pathlib.Path:
  """The user's folder for programs of this jax on this kind of processor.

  Programs for a CPU use what instructions it has, which jax's own key does not know:
  a home that several machines share must not hand one the programs of another.
  """
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  kind = hashlib.sha256(f"{platform.machine()} {instructions()}".encode()).hexdigest()
  return pathlib.Path(home) / "vlp_jax" / "programs" / f"{jax.__version__}-{kind[:12]}"


def instructions() -> str:
  """What Linux says that the processor can do; elsewhere its name."""
  info = pathlib.Path("/proc/cpuinfo")
  if info.is_file():
    for line in info.read_text("utf-8", "replace").splitlines():
      if line.startswith(("flags", "Features")):
        return line
  return platform.processor()
