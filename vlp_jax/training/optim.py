"""Optimisers and learning rates, from fields of a config."""

from collections.abc import Callable
import dataclasses
import difflib
import re
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vlp_jax.ops import schedule as schedule_lib
from vlp_jax.ops import tree
from vlp_jax.training import muon

# What is customary: biases, norms, the class token, position tables, the temperature.
# Names, not dimensions: scanned layers add an axis to both.
UNDECAYED = (
  r"(^|/)(bias|scale|cls|posemb|distance|probe|temp|log_scale)$|/(position)/embedding$"
)


@dataclasses.dataclass(frozen=True)
class Optim:
  """Fields of `config.optim`.

  Attributes:
    name: the optax optimiser. "muon" moves hidden matrices by their orthogonalised
      momentum, the rest by Adam (training/muon.py).
    lr: peak learning rate. end_lr: at the end of the run. warmup_lr: at step 0.
    warmup: grows linearly from warmup_lr to lr.
    schedule: of the time after the warm-up. "cosine" moves every step; ALBEF's official
      one every epoch, and does not count the warm-up. "step" multiplies lr by `decay`
      once every `decay_every` of the run, down to end_lr (BLIP's, by epochs).
    b1, b2, eps: of Adam's moments; momentum of sgd is b1.
    weight_decay: times the learning rate (decoupled), on parameters not in `undecayed`.
    undecayed: pattern of paths that are not decayed; None: all are.
    clip_norm: of the gradient of all parameters; None: not clipped.
    multipliers: ((pattern of paths, factor of the learning rate), …), first match wins;
      0 freezes, and costs no optimiser state.
    bounds: ((pattern, (low, high)), …): parameters are put back into the box after each
      update, as ALBEF clamps its temperature and CLIP its logit scale.
  """

  name: Literal["adamw", "adam", "sgd", "lion", "adafactor", "muon"] = "adamw"
  lr: float = 1e-3
  end_lr: float = 0.0
  warmup: schedule_lib.Duration = 0
  warmup_lr: float = 0.0
  schedule: Literal["cosine", "linear", "step", "constant"] = "cosine"
  decay: float = 0.9
  decay_every: schedule_lib.Duration = 0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.0
  undecayed: str | None = UNDECAYED
  clip_norm: float | None = None
  multipliers: tuple[tuple[str, float], ...] = ()
  bounds: tuple[tuple[str, tuple[float, float]], ...] = (
    (r"^model/temp$", (1e-3, 0.5)),  # ALBEF model_pretrain.py
    (r"^model/log_scale$", (0.0, 4.6052)),  # open_clip: at most ln 100
  )

  def __post_init__(self):
    for field in ("lr", "end_lr", "warmup_lr", "weight_decay", "eps"):
      if getattr(self, field) < 0:
        raise ValueError(
          f"config: optim.{field}={getattr(self, field)}: wants 0 or more."
        )
    if self.clip_norm is not None and self.clip_norm <= 0:
      raise ValueError(
        f"config: optim.clip_norm={self.clip_norm}: wants more than 0, or None."
      )
    for field, pairs in (("multipliers", self.multipliers), ("bounds", self.bounds)):
      for pattern, _ in pairs:
        _compile(field, pattern)
    if self.undecayed is not None:
      _compile("undecayed", self.undecayed)
    if self.schedule == "step" and not self.decay_every:
      raise ValueError(
        'config: optim.schedule="step" wants optim.decay_every, e.g. "1 epoch".'
      )
    for pattern, factor in self.multipliers:
      if factor < 0:
        raise ValueError(
          f"config: optim.multipliers: {factor} for {pattern!r}: wants 0 or more."
        )
    for pattern, (low, high) in self.bounds:
      if low > high:
        raise ValueError(
          f"config: optim.bounds: ({low}, {high}) for {pattern!r}: wants (low, high)."
        )


def make_schedule(optim: Optim, total_steps: int) -> Callable[[jax.Array], jax.Array]:
  """step -> learning rate; `optim.warmup` is in steps by now.

  Raises:
    ValueError: the warm-up is longer than the run.
  """
  warmup = optim.warmup
  if warmup and warmup >= total_steps:
    raise ValueError(
      f"config: optim.warmup is {warmup} steps, but the run has {total_steps}: shorten"
      ' it, e.g. to "5%".'
    )
  after = max(1, total_steps - warmup)
  if optim.schedule == "constant":
    rest = optax.constant_schedule(optim.lr)
  elif optim.schedule == "linear":
    rest = optax.linear_schedule(optim.lr, optim.end_lr, after)
  elif optim.schedule == "step":
    # Counted from the start of the run: the first steps of it are the warm-up's.
    passed = lambda step: (step + warmup) // optim.decay_every
    rest = lambda step: jnp.maximum(
      optim.end_lr, optim.lr * optim.decay ** passed(step)
    )
  else:
    floor = optim.end_lr / optim.lr if optim.lr else 0.0
    rest = optax.cosine_decay_schedule(optim.lr, after, alpha=floor)
  if not warmup:
    return rest
  rise = optax.linear_schedule(optim.warmup_lr, optim.lr, warmup)
  return optax.join_schedules([rise, rest], [warmup])


def make(
  optim: Optim, params: Any, *, total_steps: int
) -> tuple[optax.GradientTransformation, Callable[[jax.Array], jax.Array]]:
  """(gradient transformation, learning-rate schedule) for these parameters.

  Args:
    optim: durations in it are steps.
    params: abstract parameters: their paths decide.
    total_steps: of the run.

  Raises:
    ValueError: a pattern that matches nothing; names the nearest paths.
  """
  rate = make_schedule(optim, total_steps)
  paths = list(tree.flatten(params))
  for pattern, _ in optim.multipliers:
    _check_pattern("multipliers", pattern, paths)
  for pattern, _ in optim.bounds:
    # The default covers models of either scale.
    if pattern not in dict(type(optim).bounds):
      _check_pattern("bounds", pattern, paths)
  if optim.undecayed not in (None, UNDECAYED):
    _check_pattern("undecayed", optim.undecayed, paths)
  parts = [_moments(optim)]
  if optim.weight_decay:
    # Asked of each tree anew: frozen parameters are cut out of the ones seen here.
    decays = lambda params: _paths_to(
      params,
      lambda path: optim.undecayed is None or not re.search(optim.undecayed, path),
    )
    parts.append(optax.add_decayed_weights(optim.weight_decay, mask=decays))
  parts.append(_multiply(optim.multipliers))
  parts.append(optax.scale_by_learning_rate(rate))
  update = optax.chain(*parts)
  is_frozen = lambda path: _factor(optim.multipliers, path) == 0.0
  if any(map(is_frozen, paths)):
    update = optax.multi_transform(
      {"live": update, "frozen": optax.set_to_zero()},
      lambda params: tree.map_with_path(
        lambda path, _: "frozen" if is_frozen(path) else "live", params
      ),
    )
  clip = []
  if optim.clip_norm is not None:
    # By the norm of what is trained: frozen parameters have no say.
    live = lambda params: _paths_to(params, lambda path: not is_frozen(path))
    clip = [optax.masked(optax.clip_by_global_norm(optim.clip_norm), live)]
  return optax.chain(*clip, update, project(optim.bounds)), rate


def _moments(optim):
  if optim.name in ("adamw", "adam", "muon"):
    adam = optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps)
    return muon.scale_by_muon(adam) if optim.name == "muon" else adam
  if optim.name == "lion":
    return optax.scale_by_lion(b1=optim.b1, b2=optim.b2)
  if optim.name == "adafactor":
    factored = optax.scale_by_factored_rms()
    # Its moments lack axes that their parameter has, so they take no names of axes:
    # they are whole on every device.
    return factored._replace(init=lambda params: factored.init(nn.unbox(params)))
  return optax.trace(decay=optim.b1)


def _factor(multipliers, path):
  for pattern, factor in multipliers:
    if re.search(pattern, path):
      return factor
  return 1.0


def _multiply(multipliers):
  def update(updates, state, params=None):
    del params
    return tree.map_with_path(scale, updates), state

  def scale(path, u):
    factor = _factor(multipliers, path)
    return u if factor == 1.0 else u * factor

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def project(
  bounds: tuple[tuple[str, tuple[float, float]], ...],
) -> optax.GradientTransformation:
  """Changes updates so that params + updates lies within the bounds of its path."""

  def update(updates, state, params):
    def clip(path, u, p):
      for pattern, (low, high) in bounds:
        if re.search(pattern, path):
          return jnp.clip(p + u, low, high) - p
      return u

    return tree.map_with_path(clip, updates, params), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _paths_to(params, predicate):
  return tree.map_with_path(lambda path, _: bool(predicate(path)), params)


def _compile(field, pattern):
  try:
    re.compile(pattern)
  except re.error as error:
    raise ValueError(
      f"config: optim.{field}: {pattern!r} is no regular expression: {error}."
    ) from error


def _check_pattern(field, pattern, paths):
  if not any(re.search(pattern, path) for path in paths):
    near = difflib.get_close_matches(pattern.strip("^$"), paths, n=3, cutoff=0.2)
    raise ValueError(
      f"config: optim.{field}: {pattern!r} matches no parameter; near are"
      f" {', '.join(near or paths[:3])}."
    )
