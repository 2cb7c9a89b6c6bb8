"""How all plots look: one colour and line style per arm, fonts, saving.

Figures are made without pyplot: no display, no global state. matplotlib is imported when a plot is made.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from moe_jax import disk

DPI = 150
# Okabe and Ito's palette, safe for colour-blind readers, without its yellow, which white paper swallows.
_COLOURS = ("#222222", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = (
  "-",
  (0, (5, 1.5)),
  (0, (1.2, 1.2)),
  (0, (5, 1.5, 1.2, 1.5)),
  (0, (2.5, 2.5)),
  (0, (8, 1.5, 1.2, 1.5, 1.2, 1.5)),
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LABEL_LENGTH = 44  # longer arm names are cut in the middle in plots; tables have the whole name
RC = {
  "font.size": 9.0,
  "axes.titlesize": 9.5,
  "axes.labelsize": 9.0,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "grid.color": "#e6e6e6",
  "grid.linewidth": 0.6,
  "axes.axisbelow": True,
  "axes.formatter.useoffset": False,
  "legend.frameon": False,
  "text.parse_math": False,  # a dollar sign in an arm's name is a dollar sign
}


@dataclasses.dataclass(frozen=True)
class Plot:
  path: pathlib.Path
  caption: str
  wide: bool  # needs the page's whole width


def style(index: int) -> dict[str, Any]:
  """Colour, dashes and marker of the index-th arm; distinct for 49 arms."""
  lap = index // len(_COLOURS)
  return {
    "color": _COLOURS[index % len(_COLOURS)],
    "linestyle": _DASHES[lap % len(_DASHES)],
    "marker": _MARKERS[lap % len(_MARKERS)],
  }


def shorten(arm: str, length: int = _LABEL_LENGTH) -> str:
  """At most `length` characters: long names keep both ends, which is where methods and their values are."""
  head = (length - 1) * 2 // 3
  return arm if len(arm) <= length else f"{arm[:head]}…{arm[len(arm) - (length - 1 - head) :]}"


def figure(width: float, height: float) -> Any:
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  new = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
  FigureCanvasAgg(new)
  return new


def save(figure: Any, path: pathlib.Path, caption: str, wide: bool = False) -> Plot:
  # No software version in the file: the same numbers give the same bytes.
  with disk.whole_file(path) as file:
    kind = path.suffix.removeprefix(".")
    figure.savefig(file, format=kind, bbox_inches="tight", pad_inches=0.08, metadata={"Software": None})
  return Plot(path, caption, wide)


def set_scale(ax: Any, axis: str, values: np.ndarray, ratio: float) -> bool:
  """Logarithmic if the finite values are positive and span more than `ratio`; symlog if some are not positive."""
  from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

  values = values[np.isfinite(values)]
  positive = values[values > 0]
  if not positive.size or values.max() / positive.min() <= ratio:
    return False
  if positive.size == values.size:
    getattr(ax, f"set_{axis}scale")("log")
  else:
    getattr(ax, f"set_{axis}scale")("symlog", linthresh=float(np.quantile(positive, 0.1)))
  side = getattr(ax, f"{axis}axis")
  side.set_major_locator(LogLocator(subs=(1, 2, 5))) if positive.size == values.size else None
  side.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
  side.set_minor_formatter(NullFormatter())
  return True


def draw_yardsticks(
  ax: Any,
  yardsticks: Mapping[str, float],
  reach: float = 0.0,
  note: bool = True,
  curves: Iterable[np.ndarray] = (),
) -> None:
  """Draws a horizontal line with its name for each yardstick in view, and notes those above it.

  Args:
    ax: the axes, with everything else drawn.
    yardsticks: name -> value on the y axis.
    reach: how far the view may grow upwards to show a line, as a share of its height.
    note: whether to name the yardsticks that are above the view.
    curves: values on the y axis, from left to right. The names stand where these are further away: by default, at right.
  """
  low, high = ax.get_ylim()
  near = [y for y in yardsticks.values() if high < y <= high + reach * (high - low)]
  top = max(near, default=high)
  ax.set_ylim(low, top + 0.04 * (top - low) if near else high)
  low, high = ax.get_ylim()
  ends = np.array([[values.flat[0], values.flat[-1]] for values in curves]).reshape(-1, 2)
  for name, y in yardsticks.items():
    if low <= y <= high:
      at_left, at_right = np.abs(ends - y).min(axis=0, initial=np.inf)
      left = at_left > at_right
      ax.axhline(y, color="#777777", lw=0.9, ls=(0, (1, 1.5)), zorder=1)
      ax.annotate(
        name,
        (0.01 if left else 0.99, y),
        xycoords=("axes fraction", "data"),
        xytext=(0, 1.5),
        textcoords="offset points",
        ha="left" if left else "right",
        fontsize=7.5,
        color="#666666",
        zorder=4,
      )
  above = ", ".join(
    f"{name} {y:.2f}" for name, y in sorted(yardsticks.items(), key=lambda x: x[1]) if y > high
  )
  if above and note:
    ax.set_title(f"above: {above}", loc="right", fontsize=7.5, color="#666666")
