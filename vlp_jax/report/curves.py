"""Loss curves from the log of a run."""

from collections.abc import Sequence
import json
import math
import os
import pathlib

import numpy as np

TRAIN, HELD_OUT, FAINT = "#2457a6", "#c2410c", "#b8c7e0"


def read_log(path: str | os.PathLike) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """{name: (steps, values)} of a log of JSON lines, each {"step": …, name: value, …}.

  A step that was logged again after a resume counts as it was logged last. A line that
  a kill cut short is left out.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(
      f"report: there is no log {str(path)!r}; it is written while a run trains."
    )
  series: dict[str, dict[int, float]] = {}
  for line in path.read_text("utf-8").splitlines():
    try:
      row = json.loads(line)
      step = int(row["step"])
    except (ValueError, KeyError, TypeError):
      continue
    for name, value in row.items():
      if name != "step" and isinstance(value, (int, float)):
        series.setdefault(name, {})[step] = float(value)
  out = {}
  for name, points in series.items():
    steps = np.array(sorted(points))
    out[name] = (steps, np.array([points[s] for s in steps]))
  return out


def plot_losses(
  log: dict[str, tuple[np.ndarray, np.ndarray]],
  path: str | os.PathLike,
  *,
  objectives: Sequence[str],
  evals: Sequence[str] = (),
) -> list[str]:
  """Draws small multiples, the whole loss first, and returns the names drawn.

  Args:
    log: of `read_log`; training's own names are "loss" and the objectives', bare or
      under "train/".
    path: of the PNG; not written if there is nothing to draw.
    objectives: names of the objectives.
    evals: names of evaluations, whose "{eval}/{objective}" is the held-out loss.
  """
  panels = []
  for name in ("loss", *objectives):
    train = log.get(name) or log.get(f"train/{name}")
    held = [log[f"{e}/{name}"] for e in evals if f"{e}/{name}" in log]
    if train is not None:
      panels.append((name, train, held))
  if not panels:
    return []
  columns = min(len(panels), 4)
  rows = math.ceil(len(panels) / columns)
  # Not pyplot: it keeps state, and wants a display where it finds one.
  # Here: a run need not wait for it at its start.
  from matplotlib import figure

  picture = figure.Figure(figsize=(2.5 * columns, 2.3 * rows), layout="constrained")
  axes = picture.subplots(rows, columns, squeeze=False)
  for axis in axes.flat[len(panels) :]:
    axis.set_visible(False)
  for axis, (name, (steps, values), held) in zip(axes.flat, panels, strict=False):
    axis.plot(steps, values, color=FAINT, linewidth=0.8)
    axis.plot(steps, _smooth(values), color=TRAIN, linewidth=1.6, label="training")
    for held_steps, held_values in held:
      axis.plot(
        held_steps, held_values, "o-", color=HELD_OUT, markersize=3, label="held out"
      )
    axis.set_title("all, weighted" if name == "loss" else name.upper(), fontsize=11)
    axis.set_xlabel("step", fontsize=9)
    axis.tick_params(labelsize=9)
    axis.grid(color="#e6e6e6", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    if held:
      axis.legend(fontsize=8, frameon=False)
    _limit(axis, values, held)
  for row in axes:
    row[0].set_ylabel("loss (nats)", fontsize=9)
  picture.savefig(path, dpi=200)
  return [name for name, _, _ in panels]


def _smooth(values):
  """Running mean over a twentieth of the run, narrower at its ends."""
  half = len(values) // 40
  if not half:
    return values
  total = np.concatenate([[0.0], np.cumsum(values)])
  low = np.maximum(np.arange(len(values)) - half, 0)
  high = np.minimum(np.arange(len(values)) + half + 1, len(values))
  return (total[high] - total[low]) / (high - low)


def _limit(axis, values, held):
  """Leaves the spike of the first steps out of the picture."""
  seen = np.concatenate([values, *(v for _, v in held)])
  seen = seen[np.isfinite(seen)]
  if len(seen) < 2:
    return
  low, high = seen.min(), np.quantile(seen, 0.995)
  if high > low:
    margin = 0.06 * (high - low)
    axis.set_ylim(low - margin, high + margin)
