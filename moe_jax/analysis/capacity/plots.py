"""The figures of the capacity study: the loss in bits, and dropped assignments, against the capacity factor."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context

from moe_jax.analysis.capacity.study import NONE
from moe_jax.analysis.capacity.tables import Cell, in_order, series
from moe_jax.comparison.report import canvas

_LEGEND = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.02), "borderaxespad": 0.0, "fontsize": 8}
_SIGNS = "Large: mean over seeds, hollow where the model looks at later tokens, or may; small: seeds."
_DASHES = ("-", "--", ":")  # of groups


def write_plots(folder: pathlib.Path, found: Sequence[Cell], unit: str) -> list[canvas.Plot]:
  """Writes capacity.png and dropped.png: a line per method and kind of group, with every seed."""
  as_trained = lambda cell: cell.factor == cell.setting.factor
  without = lambda cell: cell.factor == NONE
  with rc_context(canvas.RC):
    return [
      _plot(
        folder / "capacity.png",
        found,
        (("evaluated as trained", as_trained, "bits"), ("evaluated without capacity", without, "bits")),
        unit,
        f"{unit.capitalize()} on the validation set. Left: evaluation drops what exceeds the capacity, too. Right: it "
        "drops nothing, so what remains is what the drops of training have cost.",
      ),
      _plot(
        folder / "dropped.png",
        found,
        (("training", as_trained, "dropped_in_training"), ("evaluation", as_trained, "dropped")),
        "dropped fraction",
        "Dropped fraction of (token, expert) assignments, mean over layers, in the last part of training and on the "
        "validation set at the same factor.",
      ),
    ]


def _plot(
  path: pathlib.Path,
  found: Sequence[Cell],
  panels: Sequence[tuple[str, Callable[[Cell], bool], str]],
  label: str,
  caption: str,
) -> canvas.Plot:
  factors = in_order(cell.setting.factor for cell in found)
  lines = series(found)
  methods, groups = (list(dict.fromkeys(key[i] for key in lines)) for i in (0, 1))
  figure = canvas.figure(8.6, 3.6)
  axes = figure.subplots(1, len(panels), sharey=True, gridspec_kw={"wspace": 0.08})
  for ax, (title, shows, quantity) in zip(axes, panels, strict=True):
    for index, ((method, group), own) in enumerate(lines.items()):
      look = canvas.style(methods.index(method)) | {"linestyle": _DASHES[groups.index(group)]}
      name = method if len(groups) == 1 else f"{method}, {group}"
      shift = 0.3 * (index / max(len(lines) - 1, 1) - 0.5)  # beside each other, not on each other
      by_factor = {c.setting.factor: (c, getattr(c, quantity)) for c in own if shows(c)}
      _draw(ax, by_factor, factors, shift, look, name)
    ax.set_title(title, loc="left")
    ax.set_xticks(range(len(factors)), factors)
    ax.set_xlabel("capacity factor of training")
  axes[0].set_ylabel(label)
  if lines:
    axes[-1].legend(**_LEGEND)
  return canvas.save(figure, path, f"{caption} {_SIGNS}", wide=True)


def _draw(
  ax: Any, own: dict[str, tuple[Cell, dict]], factors: list[str], shift: float, look: dict, name: str
) -> None:
  """Draws the mean of every factor, and each seed as a point. No line leads to the factor that is none."""
  shown = [(i + shift, factor, *own[factor]) for i, factor in enumerate(factors) if factor in own]
  means = [(x, float(np.mean(list(by_seed.values())))) for x, factor, _, by_seed in shown if factor != NONE]
  ax.plot(*zip(*means, strict=True), color=look["color"], linestyle=look["linestyle"], lw=1.2)
  for x, _, cell, by_seed in shown:
    seeds = list(by_seed.values())
    fill = look["color"] if cell.sees_later_tokens is False else "white"
    ax.scatter([x] * len(seeds), seeds, s=8, color=look["color"], alpha=0.4, lw=0, zorder=2)
    ax.scatter([x], [np.mean(seeds)], s=26, color=fill, edgecolors=look["color"], zorder=3)
  ax.plot([], [], color=look["color"], linestyle=look["linestyle"], marker="o", label=canvas.shorten(name))
