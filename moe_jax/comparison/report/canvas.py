"""How all plots look: one colour and line style per arm, fonts, saving.

Figures are made without pyplot: no display, no global state. matplotlib is imported when a plot is made.
"""

import dataclasses
import pathlib
from typing import Any

DPI = 150
# Okabe and Ito's palette, safe for colour-blind readers, without its yellow, which white paper swallows.
_COLOURS = ("#222222", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
_MARKERS = ("o", "s", "^", "D")
_LABEL_LENGTH = 34  # longer arm names are cut in the middle in plots; tables have the whole name
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
  """Colour, dashes and marker of the index-th arm; distinct for 28 arms."""
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
  figure.savefig(path, bbox_inches="tight", pad_inches=0.08, metadata={"Software": None})
  return Plot(path, caption, wide)
