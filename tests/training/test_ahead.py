"""Programs of the last start: taken untraced where nothing that makes them differs."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import runs
from vlp_jax import config as config_lib
from vlp_jax import config_file
from vlp_jax import job as job_lib
from vlp_jax import pretrainer as pretrainer_lib
from vlp_jax.ops import reduce
from vlp_jax.training import ahead
from vlp_jax.training import program as program_lib
from vlp_jax.training import sharding as sharding_lib

ROOT = pathlib.Path(__file__).parents[2]
FACTOR = 3.0


@pytest.fixture(scope="module", autouse=True)
def a_process_of_a_file():
  """A worker of the tests is none; and nothing is put into JAX's own cache.

  What JAX finds there is not kept again. The process begins here: tests of other files
  may have written modules, and loaded them.
  """
  name = "jax_persistent_cache_min_compile_time_secs"
  before = jax.config.values[name]
  jax.config.update(name, 1e9)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys.modules["__main__"], "__file__", pytest.__file__, raising=False)
    patch.setattr(ahead, "_BEGUN", time.time())
    yield
  jax.config.update(name, before)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory, a_process_of_a_file):
  made = sharding_lib.make_mesh(sharding_lib.Sharding())
  # The first start of this process, which loads modules that the others find.
  folder = tmp_path_factory.mktemp("first")
  code = types.SimpleNamespace(factor=FACTOR)
  for _ in range(2):
    Start(folder, code, made)
  return made


@pytest.fixture
def code(tmp_path, monkeypatch):
  """A module of the user's, on which the program depends."""
  module = types.ModuleType("a_users_module")
  module.__file__ = str(tmp_path / "a_users_module.py")
  module.factor = FACTOR
  monkeypatch.setitem(sys.modules, module.__name__, module)
  write(module, "# the first")
  return module


def write(module, text):
  """Writes its file, as if before this process began."""
  path = pathlib.Path(module.__file__)
  path.write_text(text)
  then = ahead._BEGUN - 1000 + len(text)
  os.utime(path, (then, then))


class Start:
  """A start with one program, (x, {"y"}) -> (x + sum(y) * factor, Mean).

  Attributes:
    traced: how often its function was. loaded: whether it came from a file.
    value: what is kept beside it. made: how often that was.
  """

  def __init__(self, folder, code, mesh, config="config", vocabulary="10", rows=8):
    self.traced = self.made = 0
    self._code, self._mesh = code, mesh
    with ahead.Programs(str(folder), config) as programs:
      self.thread = programs._thread
      programs.given(vocabulary, mesh)
      self.value = programs.kept("value", self._make)
      self.program = self._program(rows)
      known = programs.knows(self.program)
      programs.ready(self.program, None if known else programs.lower(self.program))
    self.thread.shutdown(wait=True)
    self.loaded = not isinstance(self.program.compiled, jax.stages.Compiled)
    x, batch = self._args(rows)
    got, mean = self.program(x, batch)
    assert got == 1.0 + rows * 2 * code.factor and x.is_deleted()
    assert isinstance(mean, reduce.Mean) and mean.value() == 2.0

  def _make(self):
    self.made += 1
    for file in getattr(self._code, "reads", ()):
      file.read_text()
    return jax.ShapeDtypeStruct((int(self._code.factor),), jnp.float32)

  def _program(self, rows):
    def step(x, batch):
      self.traced += 1
      for file in getattr(self._code, "reads_traced", ()):
        file.read_text()
      y = batch["y"]
      return x + y.sum() * self._code.factor, reduce.Mean(y.sum(), jnp.float32(y.size))

    whole = sharding_lib.replicated(self._mesh)
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    args = jax.tree.map(like, self._args(rows))
    jitted = jax.jit(step, donate_argnums=0, out_shardings=whole)
    return program_lib.Program("step", jitted, args)

  def _args(self, rows):
    x = jax.device_put(jnp.float32(1.0), sharding_lib.replicated(self._mesh))
    batch = {"y": np.full(rows, 2.0, np.float32)}
    return x, sharding_lib.put_batch(batch, self._mesh)

  @property
  def how(self):
    return self.traced, "loaded" if self.loaded else "compiled"


def test_the_last_starts_program_is_loaded_and_not_traced(tmp_path, code, mesh):
  assert Start(tmp_path, code, mesh).how == (1, "compiled")
  assert Start(tmp_path, code, mesh).how == (0, "loaded")
  assert Start(tmp_path, code, mesh).how == (0, "loaded")


def test_after_an_edit_it_is_traced_and_its_numbers_are_the_new_ones(
  tmp_path, code, mesh
):
  Start(tmp_path, code, mesh)
  # A comment: what is traced is what was kept.
  write(code, "# the first, with a comment")
  assert Start(tmp_path, code, mesh).how == (1, "loaded")
  assert Start(tmp_path, code, mesh).how == (0, "loaded")
  # Another number, which `Start` looks for in the result.
  code.factor = FACTOR + 1
  write(code, "# the second")
  assert Start(tmp_path, code, mesh).how == (1, "compiled")
  assert Start(tmp_path, code, mesh).how == (0, "loaded")
  # The first again: it is kept still.
  code.factor = FACTOR
  write(code, "# the first")
  assert Start(tmp_path, code, mesh).how == (1, "loaded")


@pytest.mark.parametrize(
  "change", [dict(config="another"), dict(vocabulary="11"), dict(rows=16)]
)
def test_of_other_things_it_is_another(tmp_path, code, mesh, change):
  Start(tmp_path, code, mesh)
  assert Start(tmp_path, code, mesh, **change).how == (1, "compiled")


def test_on_other_devices_it_is_another(tmp_path, code, mesh):
  Start(tmp_path, code, mesh)
  fewer = sharding_lib.make_mesh(sharding_lib.Sharding(), jax.devices()[:2])
  assert Start(tmp_path, code, fewer).how == (1, "compiled")
  assert Start(tmp_path, code, fewer).how == (0, "loaded")


def test_of_another_setting_or_variable_it_is_another(
  tmp_path, code, mesh, monkeypatch
):
  Start(tmp_path, code, mesh)
  with jax.default_matmul_precision("highest"):
    assert Start(tmp_path, code, mesh).traced == 1
  monkeypatch.setenv("LIBTPU_INIT_ARGS", "--something")
  assert Start(tmp_path, code, mesh).traced == 1


def test_with_other_modules_it_is_traced(tmp_path, code, mesh, monkeypatch):
  Start(tmp_path, code, mesh)
  with monkeypatch.context() as patch:
    more = types.ModuleType("another_module")  # It may have changed anything.
    more.__file__ = code.__file__
    patch.setitem(sys.modules, more.__name__, more)
    assert Start(tmp_path, code, mesh).traced == 1
  assert Start(tmp_path, code, mesh).traced == 1
  assert Start(tmp_path, code, mesh).traced == 0
  moved = tmp_path / "moved" / "a_users_module.py"
  moved.parent.mkdir()
  code.__file__ = str(moved)
  write(code, "# the first")
  assert Start(tmp_path, code, mesh).traced == 1


def test_a_module_that_only_tracing_loads_is_not_forgotten(
  tmp_path, code, mesh, monkeypatch
):
  """It is loaded in the first start; an edit shows after one that did not load it."""
  lazy = types.ModuleType("a_lazy_module")
  lazy.__file__ = str(tmp_path / "a_lazy_module.py")
  write(lazy, "# lazy")
  lower = program_lib.Program.lower

  def loads(program):
    monkeypatch.setitem(sys.modules, lazy.__name__, lazy)
    return lower(program)

  with monkeypatch.context() as patch:
    patch.setattr(program_lib.Program, "lower", loads)
    Start(tmp_path, code, mesh)
  del sys.modules[lazy.__name__]
  assert Start(tmp_path, code, mesh).traced == 0
  assert Start(tmp_path, code, mesh).traced == 0
  write(lazy, "# edited")
  assert Start(tmp_path, code, mesh).traced == 1


def test_what_is_kept_beside_it(tmp_path, code, mesh):
  made = lambda *args, **fields: Start(tmp_path, code, *args, **fields)
  shape = lambda start: (start.made, start.value.shape)
  assert shape(made(mesh)) == (1, (3,))
  for _ in range(2):
    assert shape(made(mesh)) == (0, (3,))
  # Of another vocabulary or of other devices it is another.
  assert shape(made(mesh, vocabulary="11")) == (1, (3,))
  assert shape(made(mesh)) == (1, (3,))
  fewer = sharding_lib.make_mesh(sharding_lib.Sharding(), jax.devices()[:2])
  assert shape(made(fewer)) == (1, (3,))
  assert shape(made(fewer)) == (0, (3,))
  with jax.default_matmul_precision("highest"):
    assert shape(made(fewer)) == (1, (3,))
  code.factor = FACTOR + 1
  write(code, "# edited")
  assert shape(made(fewer)) == (1, (4,))
  assert shape(made(fewer)) == (0, (4,))


def test_what_is_kept_and_broken_is_made_anew(tmp_path, code, mesh):
  Start(tmp_path, code, mesh)
  (index,) = tmp_path.glob("start-*.json")
  text = json.loads(index.read_text())
  text["values"]["value"]["value"] = "none"
  index.write_text(json.dumps(text))
  assert Start(tmp_path, code, mesh).made == 1
  assert Start(tmp_path, code, mesh).made == 0


def test_what_cannot_be_kept_hinders_no_program(tmp_path, code, mesh, monkeypatch):
  monkeypatch.setattr(Start, "_make", lambda self: lambda: self)  # It has no pickle.
  Start(tmp_path, code, mesh)
  start = Start(tmp_path, code, mesh)
  assert start.how == (0, "loaded") and start.value() is start


def test_a_job_of_kept_shapes_is_that_of_shapes(
  tmp_path, tmp_path_factory, mesh, monkeypatch
):
  """It goes through no model, and its state is the same with all that it is made of."""
  traced, call = [], pretrainer_lib.Pretrainer.__call__

  def counted(self, *args, **fields):
    traced.append(self)
    return call(self, *args, **fields)

  monkeypatch.setattr(pretrainer_lib.Pretrainer, "__call__", counted)
  config = config_lib.run(config_file.load(str(runs.CONFIG)))

  def start(folder):
    before = len(traced)
    with ahead.Programs(str(folder), "config") as programs:
      thread = programs._thread
      job = job_lib.make(config, tmp_path, programs)
      state = job.abstract_state
      programs._note(program_lib.Program("step", None, ()), "none")
    thread.shutdown(wait=True)
    return len(traced) - before, state

  start(tmp_path_factory.mktemp("before"))  # It loads modules that the others find.
  (first, want), (second, got) = start(tmp_path), start(tmp_path)
  assert (first, second) == (1, 0)
  assert want.ema is not None and want.memory
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for leaf, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert leaf == wanted and leaf.sharding == wanted.sharding


@pytest.mark.parametrize("when", ["reads", "reads_traced"])
def test_files_that_were_read(tmp_path, code, mesh, when):
  """While the model is built, or traced: with others, it may be another."""
  file = tmp_path / "classes.txt"

  def written(text):
    file.write_text(text)
    then = ahead._BEGUN - 1000 + len(text)
    os.utime(file, (then, then))

  written("one")
  # What is written is no matter, nor what is read of the system, or by its number.
  reads = lambda read: types.SimpleNamespace(read_text=read)
  log = reads(lambda: (tmp_path / "log").write_text("x"))
  null = reads(lambda: open(os.open(os.devnull, os.O_RDONLY), "rb").close())
  setattr(code, when, (file, log, pathlib.Path("/proc/self/stat"), null))
  assert Start(tmp_path, code, mesh).traced == 1
  for _ in range(2):
    start = Start(tmp_path, code, mesh)
    assert (start.traced, start.made) == (0, 0)
  written("one, two")
  start = Start(tmp_path, code, mesh)
  assert (start.traced, start.made) == (1, 1)
  assert Start(tmp_path, code, mesh).traced == 0
  file.unlink()
  setattr(code, when, ())
  assert Start(tmp_path, code, mesh).traced == 1


def test_a_file_that_is_edited_during_a_start(tmp_path, code, mesh):
  """It is not known what was read of it, so nothing is noted."""
  now = ahead._BEGUN + 1
  os.utime(code.__file__, (now, now))
  Start(tmp_path, code, mesh)
  assert not list(tmp_path.glob("start-*"))


def test_functions_that_tensorflow_has_rewritten_are_no_edits(tmp_path, code, mesh):
  """Each start writes its own into files of random names."""
  import tensorflow as tf

  def made():
    return {name for name in sys.modules if name.startswith(ahead.GENERATED)}

  data = tf.data.Dataset.range(4).map(lambda x: x + 1 if x % 2 == 0 else x)
  assert [int(x) for x in data] == [1, 1, 3, 3] and made()
  assert Start(tmp_path, code, mesh).traced == 1
  for name in made():  # In the next process, they are others.
    del sys.modules[name]
  assert Start(tmp_path, code, mesh).how == (0, "loaded")


def test_a_program_that_is_broken_is_told_of_and_made_anew(
  tmp_path, code, mesh, caplog
):
  Start(tmp_path, code, mesh)
  (file,) = tmp_path.glob("program-*")
  file.write_bytes(file.read_bytes()[:-100])
  assert Start(tmp_path, code, mesh).how[0] == 1
  assert f"{file} is broken, and is compiled anew" in caplog.text


def test_an_index_that_is_broken_is_no_matter(tmp_path, code, mesh):
  Start(tmp_path, code, mesh)
  (index,) = tmp_path.glob("start-*.json")
  for text in ("{", "{}", json.dumps({"programs": {}})):
    index.write_text(text)
    assert Start(tmp_path, code, mesh).how == (1, "loaded")
    assert Start(tmp_path, code, mesh).how == (0, "loaded")


def test_a_start_that_fails_leaves_what_the_last_one_wrote(tmp_path, code, mesh):
  Start(tmp_path, code, mesh)
  (index,) = tmp_path.glob("start-*.json")
  written = index.read_text()
  code.factor += 1
  write(code, "# edited")
  with pytest.raises(AssertionError):
    with ahead.Programs(str(tmp_path), "config") as programs:
      thread = programs._thread
      programs.given("10", mesh)
      programs._note(program_lib.Program("step", None, ()), "none")
      raise AssertionError
  thread.shutdown(wait=True)
  assert index.read_text() == written


def test_what_is_not_used_for_long_is_deleted(tmp_path, code, mesh):
  old = tmp_path / "program-old"
  old.write_bytes(b"")
  then = time.time() - ahead.UNUSED - 10
  os.utime(old, (then, then))
  others = tmp_path / "jit_step-cache"
  others.write_bytes(b"")
  os.utime(others, (then, then))
  Start(tmp_path, code, mesh)
  assert not old.exists() and others.exists()
  assert len(list(tmp_path.glob("program-*"))) == 1


def test_a_folder_that_cannot_be_written_is_no_matter(tmp_path, code, mesh):
  assert Start(tmp_path / "none" / "there", code, mesh).how == (1, "compiled")
  assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("why", ["nowhere", "store", "processes", "typed"])
def test_where_nothing_is_kept(tmp_path, mesh, monkeypatch, why):
  folder = dict(nowhere=None, store="gs://bucket/programs").get(why, str(tmp_path))
  if why == "processes":
    monkeypatch.setattr(jax, "process_count", lambda: 2)
  if why == "typed":
    monkeypatch.delattr(sys.modules["__main__"], "__file__")
  program = program_lib.Program("step", jax.jit(lambda x: x + 1), (jnp.float32(1),))
  with ahead.Programs(folder, "config") as programs:
    programs.given("10", mesh)
    assert not programs.knows(program)
    programs.ready(program)
  assert program(jnp.float32(1)) == 2
  assert not list(tmp_path.iterdir())


def test_a_call_with_other_arguments_is_told(tmp_path, code, mesh):
  Start(tmp_path, code, mesh)
  program = Start(tmp_path, code, mesh).program
  with pytest.raises(TypeError, match="was called with"):
    program(jnp.float32(1), {"z": jnp.ones(8)})


def test_debugging_sees_the_function(monkeypatch):
  program = program_lib.Program("step", lambda x: x, (), compiled=lambda x: -x)
  assert program(1) == -1
  for name in ("jax_disable_jit", "jax_debug_nans", "jax_debug_infs"):
    jax.config.update(name, True)
    try:
      assert program(1) == 1
    finally:
      jax.config.update(name, False)


# Of another process: nothing of the first one is in its memory.
SCRIPT = """
  import sys
  import jax, jax.numpy as jnp
  from vlp_jax.training import ahead, program, sharding
  with ahead.Programs(sys.argv[1], "config") as programs:
    mesh = sharding.make_mesh(sharding.Sharding())
    programs.given("10", mesh)
    def step(x):
      print("traced")
      return {"sum": (x @ x).sum() * float(sys.argv[2])}
    place = sharding.replicated(mesh)
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=place)
    made = program.Program("step", jax.jit(step, out_shardings=place), (x,))
    programs.ready(made)
  print(made(jax.device_put(jnp.ones((64, 64)), place))["sum"])
"""


def test_another_process_has_the_same(tmp_path):
  script, folder = tmp_path / "script.py", tmp_path / "programs"
  script.write_text(textwrap.dedent(SCRIPT))
  folder.mkdir()
  os.utime(script, (1e9, 1e9))
  own = dict(JAX_ENABLE_COMPILATION_CACHE="0", JAX_PLATFORMS="cpu")
  run = lambda: subprocess.run(
    [sys.executable, str(script), str(folder), "3"],
    env=os.environ | own | dict(PYTHONPATH=str(ROOT)),
    capture_output=True,
    text=True,
    check=True,
  ).stdout.split()
  want = str(64**3 * 3.0)
  assert run() == ["traced", want]
  assert run() == [want]
