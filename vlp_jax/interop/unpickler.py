"""Pickles as data: containers, numbers, and what the caller's table makes.

A pickle is a program for a small stack machine. `pickletools` decodes its
instructions; `run` carries out those that build plain data and stops at every other
one. Names of functions and classes stay names: there is no import, no call of anything
but the caller's own functions, no attribute set.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
import dataclasses
import os
import pickletools
from typing import IO, Any

import numpy as np

Calls = Mapping[str, Callable]


class Refused(ValueError):
  """The pickle asks for something that is not data."""


@dataclasses.dataclass(frozen=True)
class Global:
  """A name that a pickle mentions: "module name". Never looked up."""

  name: str


class Module(dict):
  """A module of a TorchScript archive: its attributes by name. Its code is not read."""


def run(
  program: IO[bytes],
  path: str | os.PathLike,
  *,
  calls: Calls,
  names: Collection[str],
  persistent: Callable[[Any], Any] | None = None,
  modules: str | None = None,
) -> Any:
  """What one pickle builds, read up to its end.

  Args:
    program: open at the pickle's start.
    path: for messages.
    calls: our function for each "module name" that may be called.
    names: all names that may be mentioned; as values they are `Global`.
    persistent: what a persistent id stands for; None refuses them.
    modules: names that begin so are classes whose objects are `Module`s; None: none.

  Raises:
    ValueError: naming the global, or the instruction, that is refused; or that the
      pickle is cut short or damaged.
  """
  try:
    return _execute(program, calls, names, persistent, modules)
  except Refused as e:
    raise ValueError(
      f"{path} refused: it asks for {e}, which is not data. Only tensors, numbers and"
      " plain containers are read; nothing was run. Save its state dict alone."
    ) from e
  except (IndexError, KeyError, TypeError, AttributeError, UnicodeError) as e:
    raise ValueError(f"{path} is damaged: its pickle makes no sense ({e!r}).") from e
  except (ValueError, OverflowError) as e:
    raise ValueError(f"{path} is damaged or cut short: {e}.") from e


def call(function: Any, args: tuple, calls: Calls) -> Any:
  """Our function for a name of theirs, called."""
  if not isinstance(function, Global) or function.name not in calls:
    raise Refused(f"a call of {getattr(function, 'name', type(function).__name__)}")
  return calls[function.name](*args)


PLAIN = (str, bytes, int, float, bool, type(None), Global)


def hashable(items: Iterable[Any]) -> list[Any]:
  """The items, if all can be keys: plain values, and flat tuples of them.

  A hash walks through tuples within tuples without end: a small file could crash or
  stall who asks for it.
  """
  items = list(items)
  for item in items:
    parts = item if isinstance(item, tuple) else (item,)
    if not all(isinstance(part, PLAIN) for part in parts):
      raise Refused("a key that is no plain value")
  return items


def _build(obj, state):
  if isinstance(obj, Module) and isinstance(state, dict):
    obj.update(state)
    return
  if isinstance(obj, dict) and not isinstance(obj, Module):
    return  # The version numbers of modules that torch hangs on a state dict.
  if isinstance(obj, np.dtype) and state[1] in ("<", "|", "="):
    return
  raise Refused(f"the state of a {type(obj).__name__}")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {
  "EMPTY_LIST": list,
  "EMPTY_TUPLE": tuple,
  "EMPTY_DICT": dict,
  "EMPTY_SET": set,
}
_PUSH = set(
  "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE SHORT_BINUNICODE"
  " BINUNICODE BINUNICODE8 STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES"
  " BINBYTES8".split()
)


def _execute(program, calls, names, persistent, modules):
  stack, marks, memo = [], [], {}

  def pop_mark():
    at = marks.pop()
    items = stack[at:]
    del stack[at:]
    return items

  def set_items(items):
    stack[-1].update(zip(hashable(items[::2]), items[1::2], strict=True))

  def scripted(name):
    return modules is not None and name.startswith(modules)

  def named(name):
    if name not in names and not scripted(name):
      raise Refused(name)
    return Global(name)

  for op, arg, _ in pickletools.genops(program):
    name = op.name
    if name in ("PROTO", "FRAME"):
      pass
    elif name == "STOP":
      return stack.pop()
    elif name in _PUSH:
      stack.append(arg)
    elif name in _CONSTANTS:
      stack.append(_CONSTANTS[name])
    elif name in _EMPTY:
      stack.append(_EMPTY[name]())
    elif name == "MARK":
      marks.append(len(stack))
    elif name == "POP":
      stack.pop()
    elif name == "POP_MARK":
      pop_mark()
    elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
      count = int(name[-1])
      stack[-count:] = [tuple(stack[-count:])]
    elif name == "TUPLE":
      stack.append(tuple(pop_mark()))
    elif name == "LIST":
      stack.append(pop_mark())
    elif name == "DICT":
      items = pop_mark()
      stack.append({})
      set_items(items)
    elif name == "APPEND":
      item = stack.pop()
      stack[-1].append(item)
    elif name == "APPENDS":
      items = pop_mark()
      stack[-1].extend(items)
    elif name == "ADDITEMS":
      items = hashable(pop_mark())
      stack[-1].update(items)
    elif name == "SETITEM":
      items = [stack.pop(-2), stack.pop()]
      set_items(items)
    elif name == "SETITEMS":
      items = pop_mark()
      set_items(items)
    elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
      memo[int(arg)] = stack[-1]
    elif name == "MEMOIZE":
      memo[len(memo)] = stack[-1]
    elif name in ("GET", "BINGET", "LONG_BINGET"):
      stack.append(memo[int(arg)])
    elif name == "GLOBAL":
      stack.append(named(arg))
    elif name == "STACK_GLOBAL":
      attribute, module = stack.pop(), stack.pop()
      if not (isinstance(module, str) and isinstance(attribute, str)):
        raise Refused("a global whose name is no text")
      stack.append(named(f"{module} {attribute}"))
    elif name in ("REDUCE", "NEWOBJ"):
      args = stack.pop()
      function = stack.pop()
      is_module = isinstance(function, Global) and scripted(function.name)
      if name == "NEWOBJ" and is_module and args == ():
        stack.append(Module())
      else:
        stack.append(call(function, args, calls))
    elif name == "BUILD":
      state = stack.pop()
      _build(stack[-1], state)
    elif name == "BINPERSID" and persistent is not None:
      stack.append(persistent(stack.pop()))
    else:
      raise Refused(f"the pickle instruction {name} {arg or ''}".rstrip())
  raise ValueError("the pickle does not end")
