"""The schema: what fits the annotations of a class, and how its types are found."""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import pytest

from vlp_jax import schema


@dataclasses.dataclass
class Inner:
  size: int = 1


@dataclasses.dataclass
class Outer:
  a: int
  b: float = 0.0
  c: bool = False
  d: str | None = None
  e: tuple[float, ...] = ()
  f: Literal["x", "y"] | None = "x"
  g: dict[str, int] = dataclasses.field(default_factory=dict)
  h: schema.Duration | None = None
  i: Inner | None = None
  j: tuple[int, str] = (1, "a")
  k: Any = None
  hidden: int = dataclasses.field(default=0, metadata={"internal": True})


GOOD = [
  dict(b=1),
  dict(b=1.5, c=True),
  dict(d=None),
  dict(d="x"),
  dict(e=(1, 2.0)),
  dict(f=None),
  dict(f="y"),
  dict(g={"x": 1}),
  dict(h="2 epochs"),
  dict(h=None),
  dict(i=dict(size=2)),
  dict(i=None),
  dict(j=(2, "b")),
  dict(k=(object, "anything")),
]
BAD = [
  (dict(a=1.0), "a: wrong type"),
  (dict(a=None), "a: wrong type"),
  (dict(b="1"), "wants float"),
  (dict(c=1), "wants bool"),
  (dict(d=3), "wants str or None"),
  (dict(e=[1, 2]), r"write \(1, 2\)"),
  (dict(e=("a",)), "e: wrong type"),
  (dict(f="z"), "wants 'x' or 'y' or None"),
  (dict(g={"x": "1"}), "g: wrong type"),
  (dict(h="2 weeks"), "or None"),
  (dict(i=dict(size="2")), "where.i.size: wrong type"),
  (dict(j=(2,)), "j: wrong type"),
  (dict(hidden=2), "hidden: no such field of .*test_schema:Outer"),
]


@pytest.mark.parametrize("spec", GOOD, ids=str)
def test_values_that_fit(spec):
  schema.check_fields(Outer, dict(a=1) | spec, "where")


@pytest.mark.parametrize(("spec", "message"), BAD, ids=str)
def test_values_that_do_not(spec, message):
  with pytest.raises(ValueError, match=message):
    schema.check_fields(Outer, dict(a=1) | spec, "where")


def test_fields_of_a_flax_module_are_those_of_the_config():
  class Module(nn.Module):
    width: int
    inner: nn.Dense = None

  assert schema.fields(Module) == {"width": int}
  with pytest.raises(ValueError, match="where.width is missing"):
    schema.check_fields(Module, {}, "where")
  schema.check_fields(Module, {}, "where", given={"width": 3})


def test_resolve_finds_classes_by_file_and_by_dotted_path():
  assert schema.resolve("objectives", "itc").__module__ == "vlp_jax.objectives.itc"
  found = schema.resolve("objectives", "collections:OrderedDict")
  assert found.__name__ == "OrderedDict"
  # Not every file of models/ is an encoder.
  assert "vlm" not in schema.kinds("models")
  assert {"vit", "text"} <= set(schema.kinds("models"))


def test_an_import_error_inside_a_component_is_not_hidden(tmp_path, monkeypatch):
  (tmp_path / "their_objective.py").write_text("import not_installed_here\n")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ModuleNotFoundError, match="not_installed_here"):
    schema.resolve("objectives", "their_objective:Objective")
