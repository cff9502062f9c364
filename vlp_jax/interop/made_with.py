"""What no tensor tells: the activations and epsilons that a file's layers have.

Weights load into layers of other ones, and then mean something else. Each format says
what its published models are made with; `c.init = dict(…, made_with=(("model.text.act",
"relu"),))` says it of a file that is otherwise. A config takes no dots in names, so it
says pairs; in code it may be a dict.
"""

from collections.abc import Mapping, Sequence
import os
from typing import Any

# A field of the model by its path in the config -> its value, or a set of such.
Made = Mapping[str, Any]
Told = Made | Sequence[tuple[str, Any]]

# Vision Transformers of timm, as ALBEF and BLIP have them too.
TIMM = {"act": "gelu", "norm_eps": 1e-6}
# configuration_bert.py, and the files of ALBEF and BLIP that name it.
BERT = {"act": "gelu", "norm_eps": 1e-12, "norm": "post"}


def of(**towers: Mapping[str, Any]) -> dict[str, Any]:
  """{"model.image.act": …} of towers and their fields: of(image=TIMM, text=BERT)."""
  return {
    f"model.{tower}.{name}": value
    for tower, fields in towers.items()
    for name, value in fields.items()
  }


def check(
  model: Any, made: Made, path: str | os.PathLike, told: Told | None = None
) -> None:
  """Holds a model against what a file was made with.

  Args:
    model: the `VLM`; None: there is none to compare. Towers that it does not have, and
      fields that a tower of its kind does not have, do not count.
    made: of the format. told: what the user says of the file, over that.
    path: the file, for the message.

  Raises:
    ValueError: one that lists all that differ, or a path that no model has.
  """
  if model is None:
    return
  told = dict(told or {})
  found = {**made, **told}
  own = fields(model, found)
  for name in told:
    if name not in own:
      raise ValueError(
        f"{path}: made_with={name!r}: the model has no such field; want a path as"
        " 'model.text.act'."
      )
  wrong = [
    f"  {name}={own[name]!r}, but the checkpoint wants {_some(found[name])}"
    for name in found
    if name in own and not _fits(own[name], found[name])
  ]
  if wrong:
    raise ValueError("\n".join([f"{path} was made with other layers:", *wrong]))


def fields(model: Any, names: Mapping[str, Any]) -> dict[str, Any]:
  """{"model.image.act": value} of those of `names` that the model has."""
  found = {}
  for name in names:
    at = model
    for part in name.split(".")[1:]:
      at = getattr(at, part, None)
    if at is not None or name.count(".") == 1:
      found[name] = at
  return found


def _fits(value, wanted):
  return value in wanted if isinstance(wanted, frozenset) else value == wanted


def _some(wanted):
  if isinstance(wanted, frozenset):
    return " or ".join(sorted(map(repr, wanted)))
  return repr(wanted)
