"""What all tests share: eight CPU devices, a cache of compiled programs, quiet TF."""

import os
import pathlib

import jax

ROOT = pathlib.Path(__file__).parent.parent

# In the environment, so that processes which tests start share it: compiling is what
# most tests wait for (a tiny ALBEF's step: 12 s, from the cache 1.5 s).
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

# Not in the environment: a process that a test starts has one device, as on a laptop,
# unless it asks for more. What is not put on a mesh stays on the first of the eight.
jax.config.update("jax_num_cpu_devices", 8)

# TensorFlow's C++ log; set before the first import of it.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
