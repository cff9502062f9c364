"""Programs of a config's last start, loaded while this start builds its model.

JAX knows a program by what it was lowered to, and to trace and lower a step takes as
long as to load it from JAX's cache, and comes before. What a program is made of is
known sooner: a train step is a function of the code, the config, the vocabulary, the
number of examples (`job.shapes`), JAX's settings and the devices. Where all of them are
those of the last start, so is the program, and nothing is traced. Code is taken to be
the same as Python takes its own compiled files to be: by the size and the time of every
module's file, and of every file that Python opened while the model was built or traced.
After an edit the step is traced, and what is loaded is used where the same comes out.
The shapes of the model's parameters are kept with them (`kept`).

By JAX's public `serialize_executable`, beside JAX's own cache, which keeps what each of
these programs was first compiled to.
"""

import base64
from collections.abc import Callable
from concurrent import futures
import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib
import pickle
import sys
import threading
import time
from typing import Any, TypeVar
import zlib

import jax
from jax.experimental import serialize_executable
import jaxlib

from vlp_jax.training import cache
from vlp_jax.training import program as program_lib

_log = logging.getLogger("vlp_jax")

# What of the environment JAX and its compilers read.
VARIABLES = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "CUDA_", "NVIDIA_", "NCCL_", "TF_")
# How the modules are named that TensorFlow makes of functions it is given.
GENERATED = "__autograph_generated_file"
# A program that no start asked for in so long is deleted, seconds.
UNUSED = 30 * 24 * 3600

T = TypeVar("T")

_from_cache = threading.local()


def _listen(event, **_):
  if event == "/jax/compilation_cache/cache_hits":
    _from_cache.hits = getattr(_from_cache, "hits", 0) + 1


jax.monitoring.register_event_listener(_listen)

_reads = threading.local()


def _hear(event, args):
  """Notes what this thread opens to read, where that is to be known."""
  if event != "open" or getattr(_reads, "files", None) is None:
    return
  path, _, flags = args
  if isinstance(path, int) or (flags or 0) & (os.O_WRONLY | os.O_RDWR):
    return
  path = os.path.abspath(os.fsdecode(path))
  # Of a module there is its source; and what the system tells is no file.
  if not path.endswith(".pyc") and not path.startswith(("/proc/", "/sys/", "/dev/")):
    _reads.files.add(path)


@functools.cache
def _ears():
  sys.addaudithook(_hear)


class Programs:
  """Those of the start of a run: a context, which keeps them when `end` is called.

  Of several processes each has its own devices, and nothing is kept.
  """

  def __init__(self, folder: str | None, config: str):
    """JAX knows its devices already, or may now look for them.

    folder: of JAX's cache, or None. config: as text.
    """
    self._folder = None
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    # Code that was typed in has no file by which to know it again.
    here = main is not None and folder is not None and "://" not in folder
    if here and jax.process_count() == 1:
      self._folder = pathlib.Path(folder)
    self._config = config
    self._thread = self._readers = None
    self._coming: dict[str, futures.Future] = {}
    # Of the last start: its programs; what else it kept; {module: [file, time, size]}
    # of all it loaded, and {file: the same} of what it read; the names of the modules
    # that were there before its model.
    self._last: dict[str, dict[str, str]] = {}
    self._values: dict[str, dict[str, str]] = {}
    self._modules: dict[str, list] = {}
    self._first: set[str] = set()
    self._now: dict[str, dict[str, str]] = {}
    self._made: dict[str, tuple[str, Any]] = {}
    self._opened: set[str] = set()
    self._same = False  # Whether what the last start knew holds for this one.
    self._given = ""

  # --- The start ---------------------------------------------------------------

  def __enter__(self) -> "Programs":
    if self._folder is None:
      return self
    of = json.dumps([self._config, _environment()], sort_keys=True)
    self._of = hashlib.sha256(of.encode()).hexdigest()
    self._index = self._folder / f"start-{self._of[:16]}.json"
    try:
      last = json.loads(self._index.read_text("utf-8"))
      self._last, self._modules = dict(last["programs"]), dict(last["modules"])
      self._values, self._first = dict(last["values"]), set(last["first"])
    except (OSError, ValueError, KeyError):
      self._last, self._values, self._modules, self._first = {}, {}, {}, set()
    _ears()
    self._thread = futures.ThreadPoolExecutor(1, "ahead")
    # The state's program and the step's, side by side.
    self._readers = futures.ThreadPoolExecutor(2, "reading")
    self._unchanged = self._thread.submit(_unchanged, self._modules)
    for entry in self._last.values():
      self._load(entry["file"])
    return self

  def __exit__(self, mistake: type | None, *_: Any) -> None:
    if mistake is not None:
      self._now.clear()  # Of a start that failed, there is not all.
    self.end()

  def given(self, what: str, mesh: jax.sharding.Mesh) -> None:
    """Says what all is made of, beside code, config and JAX's settings.

    Before the model is built, in the thread that does it.
    """
    if self._thread is None:
      return
    devices = [device.id for device in mesh.devices.flat]
    self._given = f"{what} {dict(mesh.shape)} {devices}"
    loaded = _files()
    self._same = self._unchanged.result() and loaded.keys() == self._first
    self._same = self._same and all(
      self._modules[name][0] == file for name, file in loaded.items()
    )
    self._first = set(loaded)
    _reads.files = self._opened

  def kept(self, name: str, make: Callable[[], T]) -> T:
    """What `make` returns, or returned in the last start, where nothing differs.

    make: a function of what was `given`; what it returns can be pickled.
    """
    if self._thread is None:
      return make()
    _reads.files = None  # The model is built.
    made_of = self._hash(name)
    said = self._values.get(name) if self._same else None
    if said is not None and said["made_of"] == made_of:
      try:
        return pickle.loads(zlib.decompress(base64.b64decode(said["value"])))
      except Exception as error:  # pickle raises anything
        _log.debug("%s is broken, and is made anew: %s", name, error)
    with self._hearing():
      value = make()
    self._made[name] = (made_of, value)
    return value

  @contextlib.contextmanager
  def _hearing(self):
    """What this thread opens in it is what things are made of."""
    before, _reads.files = getattr(_reads, "files", None), self._opened
    try:
      yield
    finally:
      _reads.files = before

  def end(self) -> None:
    """What was asked for is written down, what was not is dropped."""
    if self._thread is None:
      return
    for coming in self._coming.values():
      coming.cancel()
    self._coming.clear()
    _reads.files = None
    if self._now:
      opened = sorted(self._opened)
      self._thread.submit(self._write, dict(self._now), dict(self._made), opened)
    self._readers.shutdown(wait=False)
    self._thread.shutdown(wait=False)
    self._thread = None

  # --- A program ---------------------------------------------------------------

  def knows(self, program: program_lib.Program) -> bool:
    """Whether it need not be lowered: it is that of the last start."""
    if self._thread is None or not self._same:
      return False
    said = self._last.get(program.name)
    return said is not None and said["made_of"] == self._made_of(program)

  def lower(self, program: program_lib.Program) -> jax.stages.Lowered:
    """It, traced; what it reads meanwhile is known."""
    if self._thread is None:
      return program.lower()
    with self._hearing():
      return program.lower()

  def ready(
    self,
    program: program_lib.Program,
    lowered: jax.stages.Lowered | None = None,
  ) -> None:
    """Has it `compiled`; loaded, where a start has kept it.

    Args:
      lowered: None: it is known, or is lowered here.
    """
    if self._thread is None:
      program.compiled = program.compile(lowered or self.lower(program))
      return
    if lowered is None and self.knows(program):
      if self._take(program, self._last[program.name]["file"]):
        return
    lowered = lowered or self.lower(program)
    file = self._file(program, lowered)
    if self._take(program, file):
      return
    before = getattr(_from_cache, "hits", 0)
    program.compiled = program.compile(lowered)
    # What JAX has loaded itself cannot be written again: jax 0.10 loses its functions.
    if getattr(_from_cache, "hits", 0) == before:
      self._thread.submit(self._keep, program.compiled, file)
      self._note(program, file)

  def _take(self, program, file):
    """Whether it is in the file, and so is `compiled` now."""
    program.compiled = self._loaded(file, program)
    if program.compiled is None:
      return False
    self._note(program, file)
    return True

  def _made_of(self, program):
    leaves, tree = jax.tree.flatten(program.args)
    shapes = [f"{x.shape} {x.dtype} {x.sharding}" for x in leaves]
    return self._hash(str(program.options), str(tree), *shapes)

  def _hash(self, *more):
    # A module of the user's may have changed settings when it was imported.
    said = "\n".join([self._given, str(_settings()), *more])
    return hashlib.sha256(said.encode()).hexdigest()

  def _file(self, program, lowered):
    made_of = self._made_of(program)
    said = f"{self._of} {program.name} {made_of} {lowered.as_text()}"
    return f"program-{hashlib.sha256(said.encode()).hexdigest()[:32]}"

  def _note(self, program, file):
    self._now[program.name] = {"made_of": self._made_of(program), "file": file}

  # --- In the threads ----------------------------------------------------------

  def _load(self, file):
    coming = self._coming.get(file)
    if coming is None:
      coming = self._readers.submit(_read, self._folder / file)
      self._coming[file] = coming
    return coming

  def _loaded(self, file, program):
    """It, called with a program's arguments; None: it is not there, or is broken."""
    found = self._load(file).result()
    self._coming.pop(file, None)
    if found is None:
      return None
    compiled, shape = found
    # Here: what the shape is of is imported now.
    out = jax.tree.structure(pickle.loads(shape))
    return _Loaded(compiled, jax.tree.structure(program.args), out)

  def _keep(self, compiled, file):
    try:
      kept, given, out = serialize_executable.serialize(compiled)
      places = jax.tree.leaves(compiled.output_shardings)
      devices = [device.id for device in places[0].mesh.devices.flat]
      shape = pickle.dumps(jax.tree.unflatten(out, range(out.num_leaves)))
      leaves = given.num_leaves, out.num_leaves
      data = pickle.dumps((kept, *leaves, shape, devices))
      _put(self._folder / file, zlib.compress(data, 1))
    except Exception as error:  # Whatever it is, the run does without.
      _log.debug("a program is not kept: %s", error)

  def _write(self, now, made, opened):
    """The index; what of the last start this one had no use for stays in it."""
    # What was not traced may have been made of modules that are not loaded now.
    modules = (self._modules if self._same else {}) | _modules()
    modules |= {file: _stamp(file) for file in opened}
    if any(stamp[1] >= _BEGUN * 1e9 for stamp in modules.values()):
      return  # A file was edited meanwhile: it is not known what was read of it.
    programs = {name: said for name, said in self._last.items() if self._same} | now
    # Of a program whose writing failed there is no file.
    programs = {
      k: v for k, v in programs.items() if (self._folder / v["file"]).exists()
    }
    values = dict(self._values) if self._same else {}
    try:
      for name, (made_of, value) in made.items():
        values[name] = {"made_of": made_of, "value": _text(value)}
    except Exception as error:  # A module of the user's may hold what has no pickle.
      _log.debug("shapes are not kept: %s", error)
    try:
      for said in programs.values():
        os.utime(self._folder / said["file"])
      text = dict(
        programs=programs, values=values, modules=modules, first=sorted(self._first)
      )
      _put(self._index, json.dumps(text).encode())
      for file in self._folder.glob("program-*"):
        if time.time() - file.stat().st_mtime > UNUSED:
          file.unlink()
    except OSError as error:
      _log.debug("programs are not kept: %s", error)


NOTHING = Programs(None, "")  # Of a start that nothing is kept of.


class _Loaded:
  """Called as the program that was kept; that itself is of leaves, not of trees.

  Trees are of classes, and what they are defined in is not imported while it is loaded.
  """

  def __init__(self, compiled, given, out):
    self._compiled, self._given, self._out = compiled, given, out

  def __call__(self, *args):
    leaves, given = jax.tree.flatten(args)
    if given != self._given:
      raise TypeError(f"a program for {self._given} was called with {given}")
    return jax.tree.unflatten(self._out, self._compiled(*leaves))


def _read(file):
  """(Compiled, of leaves; its results as a pickled tree), or None."""
  try:
    kept, given, got, shape, ids = pickle.loads(zlib.decompress(file.read_bytes()))
    there = {device.id: device for device in jax.devices()}
    compiled = serialize_executable.deserialize_and_load(
      kept,
      jax.tree.structure((tuple(range(given)), {})),
      jax.tree.structure(tuple(range(got))),
      execution_devices=[there[i] for i in ids],
    )
    return compiled, shape
  except FileNotFoundError:
    return None
  except Exception as error:
    _log.warning("%s is broken, and is compiled anew: %s", file, error)
    file.unlink(missing_ok=True)
    return None


def _text(value):
  return base64.b64encode(zlib.compress(pickle.dumps(value))).decode("ascii")


def _put(file, data):
  """All of it, or nothing."""
  part = file.with_name(f"{file.name}.{os.getpid()}")
  try:
    part.write_bytes(data)
    part.replace(file)
  except OSError:
    part.unlink(missing_ok=True)
    raise


# --- What a program depends on -------------------------------------------------


def _environment():
  """Of JAX, its settings, its compilers and devices: plain data."""
  device = jax.devices()[0]
  client = device.client
  return {
    "python": sys.version,
    "jax": [jax.__version__, jaxlib.__version__, client.platform_version],
    "settings": _settings(),
    "variables": {k: v for k, v in os.environ.items() if k.startswith(VARIABLES)},
    "devices": [f"{d.id} {d.device_kind} {d.platform}" for d in jax.devices()],
    "processor": cache.instructions() if device.platform == "cpu" else "",
  }


def _settings():
  """Of JAX, those of this thread: {name: as text}."""
  known = jax.config.values
  return {name: repr(getattr(jax.config, name, known[name])) for name in sorted(known)}


def _files():
  """{name of a module that is loaded: its file}, where it has one.

  Not those that tf.data writes while it runs (`tensorflow.autograph`, from functions of
  other modules, into files of random names): what trains is not made of them.
  """
  files = {n: getattr(m, "__file__", None) for n, m in list(sys.modules.items())}
  return {
    name: file
    for name, file in files.items()
    if isinstance(file, str) and not name.startswith(GENERATED)
  }


def _modules():
  """{name of a module that is loaded: [its file, the file's time in ns, its size]}."""
  return {name: _stamp(file) for name, file in _files().items()}


def _stamp(file):
  try:
    at = os.stat(file)
  except OSError:
    return [file, 0, 0]
  return [file, at.st_mtime_ns, at.st_size]


def _unchanged(modules):
  """Whether the files of modules are as they were; of none it is not known."""
  return bool(modules) and all(_stamp(stamp[0]) == stamp for stamp in modules.values())


def _began():
  """When this process began, seconds since the epoch."""
  try:
    words = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    up = pathlib.Path("/proc/uptime").read_text().split()[0]
    return time.time() - float(up) + int(words[19]) / os.sysconf("SC_CLK_TCK")
  except (OSError, ValueError, IndexError):
    return time.time() - 60  # Not before it imported its first module.


_BEGUN = _began()
