"""What all tests share: eight CPU devices, a cache of compiled programs, quiet TF."""

import gc
import os
import pathlib

import jax

ROOT = pathlib.Path(__file__).parent.parent

# In the environment, so that workers and the processes which tests start share it:
# compiling is what most tests wait for (a tiny ALBEF's step: 12 s, from the cache 1.5).
# Of an entry that another one still writes JAX warns, and compiles the program itself.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

# What is compiled runs for milliseconds: XLA and LLVM need not polish it (without it,
# the suite took 16 minutes, with it 10), nor keep the stack behind each operation.
for name, value in {
  "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  "JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS": "0",
}.items():
  os.environ.setdefault(name, value)
  jax.config.update(name.lower(), os.environ[name] == "1")

# JAX 0.10 compiles the step of a tiny ALBEF for eight devices in 7 s without these
# emitters of kernels and in 16 s with them. Later versions have no such switch. All
# code of a program then is one module of LLVM, which need not be cut into 32: the other
# worker has the other core.
if jax.__version_info__ < (0, 11):
  flags = os.environ.get("XLA_FLAGS", "")
  faster = "--xla_cpu_use_fusion_emitters=false"
  faster += " --xla_cpu_parallel_codegen_split_count=1"
  os.environ["XLA_FLAGS"] = f"{flags} {faster}".strip()

# Not in the environment: a process that a test starts has one device, as on a laptop,
# unless it asks for more. What is not put on a mesh stays on the first of the eight.
jax.config.update("jax_num_cpu_devices", 8)

# TensorFlow's C++ log; set before the first import of it.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Traces are large trees of objects, through all of which Python looks for cycles again
# and again: where nothing but traces is made, that took a sixth of the time.
gc.set_threshold(100_000, 20, 50)

# The files that take longest begin first, so that workers end together.
LONGEST = (
  "test_resume.py",
  "test_bad_input.py",
  "test_slurm.py",
  "test_sharding.py",
  "test_moves.py",
  "test_all.py",
  "test_objectives.py",
  "test_models.py",
)


def pytest_collection_modifyitems(items):
  """Stable: the rest stays in order."""
  place = {name: i for i, name in enumerate(LONGEST)}
  items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))
