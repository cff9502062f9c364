"""Preprocessing as one line of a config: "decode|random_resized_crop(64)|flip".

A word is a public function of a file data/ops_*.py whose annotation says that it
returns an `Op`; in its parentheses stand Python literals for its arguments.
"""

import ast
import difflib
import functools
import importlib
import inspect
import pathlib
import typing
from typing import Any

from vlp_jax.data import ops_image
from vlp_jax.data import ops_regions
from vlp_jax.data.ops_image import Op

IMAGES = ops_image.__name__  # where the words on images are
REGIONS = ops_regions.__name__  # and the one on regions, in their place
SIZED = ("fit", "naflex")


def parse(text: str) -> Op:
  """The op that a pp string says: its words, one after the other.

  Raises:
    ValueError: a word that does not exist, arguments that it does not take, or words
      on images that do not begin with `decode`.
  """
  ops = _ops(text)
  _check_order([name for name, _ in ops if words()[name].__module__ == IMAGES], text)
  pixels = not leaves_regions(text)

  def chain(example, rng):
    for _, op in ops:
      example = op(example, rng)
    if pixels:
      example = example | {"image": ops_image.pixels(example["image"])}
    return example

  return chain


def parse_captions(text: str) -> Op:
  """The words of a pp string on captions alone: what they do where no image is read."""
  on_images = (IMAGES, REGIONS)
  ops = [op for name, op in _ops(text) if words()[name].__module__ not in on_images]

  def chain(example, rng):
    for op in ops:
      example = op(example, rng)
    return example

  return chain


def leaves_sizes(text: str) -> bool:
  """Whether examples get an "image_size": images of several sizes on one canvas."""
  return any(name in SIZED for name, _ in _ops(text))


def leaves_grids(text: str) -> bool:
  """Whether that is the grid of each image's patches, which lie in a row (naflex)."""
  return any(name == "naflex" for name, _ in _ops(text))


def swaps(text: str) -> bool:
  """Whether it changes the places of an example's two images."""
  return any(name == "swap_sides" for name, _ in _ops(text))


def leaves_regions(text: str) -> bool:
  """Whether an example's "image" is rows of a detector's regions, and no pixels."""
  return any(words()[name].__module__ == REGIONS for name, _ in _ops(text))


@functools.cache
def words() -> dict[str, Any]:
  """All words, name -> function."""
  found = {}
  for file in sorted(pathlib.Path(__file__).parent.glob("ops_*.py")):
    module = importlib.import_module(f"vlp_jax.data.{file.stem}")
    for name, function in vars(module).items():
      if name.startswith("_") or not inspect.isfunction(function):
        continue
      if inspect.signature(function).return_annotation is Op:
        found[name] = function
  return found


def _ops(text):
  """[(name, op)] of each word."""
  ops = []
  for name, args, kwargs in _split(text):
    function = _function(name, text)
    _check(function, name, args, kwargs)
    try:
      ops.append((name, function(*args, **kwargs)))
    except ValueError as error:
      raise ValueError(f"pp: {name}: {error}") from error
  return ops


def _check_order(names, text):
  """Images come as files: the first word on them decodes them, and no other."""
  if leaves_regions(text):
    if names:
      raise ValueError(
        f"pp: {text!r}: regions(…) reads no pixels: leave out {', '.join(names)}."
      )
    return
  if not names or names[0] != "decode":
    first = f"before {names[0]}" if names else "for the image"
    raise ValueError(f"pp: {text!r} lacks decode {first}: images come as files.")
  if "decode" in names[1:]:
    raise ValueError(f"pp: {text!r} says decode twice: leave the later one out.")
  for name in SIZED:
    if name in names[:-1]:
      raise ValueError(f"pp: {text!r}: {name} pads, so it is the last word on images.")


def _split(text):
  """[(name, args, kwargs)] of each word."""
  if not isinstance(text, str):
    raise ValueError(f"pp: want a string like 'decode|resize(64)', got {text!r}.")
  if not text.strip():
    return []
  # The string is a Python expression: words joined by the operator |.
  try:
    node = ast.parse(text.strip(), mode="eval").body
  except SyntaxError as error:
    raise ValueError(
      f"pp: {text!r} does not parse ({error.msg}): want words joined by |, each with"
      " its arguments in parentheses, like 'decode|random_resized_crop(64,"
      " min_area=0.5)|flip'."
    ) from error
  nodes = []
  while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
    nodes.append(node.right)
    node = node.left
  return [_word(n, text) for n in [node, *reversed(nodes)]]


def _word(node, text):
  call = isinstance(node, ast.Call)
  name = node.func if call else node
  if not isinstance(name, ast.Name):
    raise ValueError(
      f"pp: {ast.unparse(node)!r} in {text!r} is no word: want name or name(arguments)."
    )
  if not call:
    return name.id, (), {}
  try:
    args = tuple(ast.literal_eval(arg) for arg in node.args)
    kwargs = {k.arg: ast.literal_eval(k.value) for k in node.keywords}
  except (ValueError, TypeError) as error:
    raise ValueError(
      f"pp: {ast.unparse(node)!r}: arguments are numbers and strings, not expressions."
    ) from error
  return name.id, args, kwargs


def _function(name, text):
  if name in words():
    return words()[name]
  near = difflib.get_close_matches(name, list(words()), n=1, cutoff=0.5)
  raise ValueError(
    f"pp: no word {name!r} (in {text!r})"
    + (f"; did you mean {near[0]!r}?" if near else ".")
    + f" There are: {', '.join(sorted(words()))}."
  )


def _check(function, name, args, kwargs):
  """Raises ValueError where a word does not take these arguments."""
  signature = inspect.signature(function)
  takes = f"{name} takes: {', '.join(_described(signature)) or 'nothing'}."
  for key in kwargs:
    if key not in signature.parameters:
      near = difflib.get_close_matches(str(key), list(signature.parameters), n=1)
      hint = f"; did you mean {near[0]!r}?" if near else "."
      raise ValueError(f"pp: {name} has no argument {key!r}{hint} {takes}")
  try:
    bound = signature.bind(*args, **kwargs)
  except TypeError as error:
    raise ValueError(f"pp: {name}: {error}. {takes}") from error
  for key, value in bound.arguments.items():
    hint = signature.parameters[key].annotation
    fits = {int: (int,), float: (int, float), str: (str,)}.get(hint)
    if fits and type(value) not in fits:
      raise ValueError(
        f"pp: {name}: {key}={value!r} is of type {type(value).__name__}, want"
        f" {hint.__name__}. {takes}"
      )
    choices = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal and value not in choices:
      raise ValueError(
        f"pp: {name}: {key}={value!r}: want one of {', '.join(map(repr, choices))}."
      )


def _described(signature):
  for name, parameter in signature.parameters.items():
    default = parameter.default
    yield name if default is parameter.empty else f"{name}={default!r}"
