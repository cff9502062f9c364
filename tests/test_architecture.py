"""Who may import whom, and the shape of the tree: read from the files themselves."""

import ast
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "vlp_jax"

# Part of the package -> the other parts it may import.
IMPORTS = {
  "ops": (),
  "nn": ("ops",),
  "models": ("nn", "ops"),
  "objectives": ("nn", "ops"),
  "pretrainer": ("models", "nn", "ops"),
  "data": ("memory",),
  "memory": (),
  "training": ("ops",),
  "evaluators": ("data", "ops"),
  "interop": ("models", "ops"),
  "explain": ("models", "ops"),
  "schema": (),
  "config": ("schema",),
  "config_file": ("schema",),
  "clock": ("config", "schema"),
  "places": (),
}
# What puts it all together, and may import everything.
ENTRY = {
  "__init__",
  "__main__",
  "batch",
  "bench",
  "build",
  "card",
  "cli",
  "convert",
  "evaluate",
  "feeds",
  "job",
  "loop",
  "plan",
  "planning",
  "report",
  "train",
}
# Part -> packages of others that it never imports.
FORBIDDEN = {
  "ops": ("tensorflow", "tensorflow_datasets", "clu"),
  "nn": ("tensorflow", "tensorflow_datasets", "clu"),
  "models": ("tensorflow", "tensorflow_datasets", "clu"),
  "objectives": ("tensorflow", "tensorflow_datasets", "clu"),
  "pretrainer": ("tensorflow", "tensorflow_datasets", "clu"),
  "training": ("tensorflow", "tensorflow_datasets", "clu"),
  "data": ("jax", "jaxlib", "flax", "optax", "orbax", "clu"),
}
# What config files and their readers live on, beside the standard library.
CONFIG_IMPORTS = {"etils", "ml_collections", "vlp_jax"}
TOP = {
  "LICENSE",
  "README.md",
  "configs",
  "launch",
  "pyproject.toml",
  "setup.cfg",
  "tests",
  "vlp_jax",
}
JUNK_DRAWERS = re.compile(r"(^|_)(utils?|common|helpers?|misc)(_|$)")
CLASSES = re.compile(r"^Base[A-Z]|Manager$|Helper$|Registry$")
CONFIG_LINES = {"parts.py": 200, "tasks.py": 100}
FILES = sorted(PACKAGE.rglob("*.py"))


def relative(path):
  return str(path.relative_to(ROOT))


def part(path):
  """The folder right below the package, or the file's own name there."""
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
  """Full names of all that a file imports, inside functions too."""
  names = []
  for node in ast.walk(ast.parse(path.read_text("utf-8"))):
    if isinstance(node, ast.Import):
      names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{relative(path)}:{node.lineno}: a relative import"
      names += [f"{node.module}.{alias.name}" for alias in node.names]
  return names


def ours(name):
  """The part that an imported name belongs to, or None."""
  package, *rest = name.split(".")
  return rest[0] if package == "vlp_jax" and rest else None


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_follow_the_table(path):
  here = part(path)
  assert here in IMPORTS or here in ENTRY, f"{here}: say in this table what it imports"
  names = imports(path)
  if here in IMPORTS:
    wrong = {ours(name) for name in names} - {None, here, *IMPORTS[here]}
    assert not wrong, f"{relative(path)} imports {wrong}: see IMPORTS"
  packages = {name.partition(".")[0] for name in names}
  assert not packages & set(FORBIDDEN.get(here, ()))
  if here in ("schema", "config", "config_file", "clock", "cli"):
    assert packages - CONFIG_IMPORTS <= sys.stdlib_module_names


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_names(path):
  for name in path.relative_to(PACKAGE).with_suffix("").parts:
    assert not JUNK_DRAWERS.search(name), f"{relative(path)}: name what it is about"
  for node in ast.walk(ast.parse(path.read_text("utf-8"))):
    if isinstance(node, ast.ClassDef):
      assert not CLASSES.search(node.name), f"{relative(path)}: {node.name}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_say_what_they_are(path):
  assert ast.get_docstring(ast.parse(path.read_text("utf-8"))), relative(path)


def test_every_folder_of_the_package_is_a_package():
  folders = {path.parent for path in FILES}
  lacking = [relative(f) for f in folders if not (f / "__init__.py").is_file()]
  assert not lacking, "setup.cfg would not install them"


def test_the_top_level_is_what_it_should_be():
  listed = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  if listed.returncode:
    pytest.skip("not a git clone")
  names = {line.partition("/")[0] for line in listed.stdout.splitlines()}
  assert {name for name in names if not name.startswith(".")} <= TOP


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.py")), ids=relative)
def test_configs_are_short_plain_files(path):
  packages = {name.partition(".")[0] for name in imports(path)}
  assert packages <= {"configs", "ml_collections"}
  text = path.read_text("utf-8")
  # A baseline may say at length where its numbers are from.
  doc = ast.get_docstring(ast.parse(text)) or ""
  lines = len(text.splitlines()) - len(doc.splitlines())
  most = CONFIG_LINES.get(path.name, 40)
  assert lines <= most, f"{relative(path)}: {lines} lines, {most} at most"


def modules(*parts):
  """Dotted names of all modules of some parts."""
  names = [relative(p).removesuffix(".py").replace("/", ".") for p in FILES]
  found = [name.removesuffix(".__init__") for name in names]
  return [
    name for name in found if name.split(".")[1:2] and name.split(".")[1] in parts
  ]


def imported_without(names, blocked):
  """Imports modules in a process where others cannot be had.

  Looking for the unwanted in sys.modules would prove nothing: tensorflow itself imports
  jax where there is one.
  """
  code = f"""
    import importlib, sys
    for name in {blocked!r}:
      sys.modules[name] = None
    for name in {names!r}:
      importlib.import_module(name)
  """
  run = [sys.executable, "-c", textwrap.dedent(code)]
  return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_train_step_needs_no_tensorflow():
  names = modules("ops", "nn", "models", "objectives", "pretrainer", "training")
  done = imported_without(names, ["tensorflow", "tensorflow_datasets"])
  assert done.returncode == 0, done.stderr


def test_a_run_begins_before_tensorflow_is_imported():
  """Its data are built, and the first batches made, without."""
  names = ["vlp_jax.loop", "vlp_jax.data.pipeline", "vlp_jax.data.sources.scenes"]
  done = imported_without(names, ["tensorflow", "tensorflow_datasets"])
  assert done.returncode == 0, done.stderr


def test_data_needs_no_jax():
  done = imported_without(modules("data"), ["jax", "flax"])
  assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_nothing_else():
  done = imported_without(["vlp_jax", "vlp_jax.cli"], ["jax", "tensorflow", "numpy"])
  assert done.returncode == 0, done.stderr
