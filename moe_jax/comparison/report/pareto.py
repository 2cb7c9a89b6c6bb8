"""Quality against balance: a point per arm, the front of arms that no other beats in both, and yardsticks."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.comparison.differences import Difference
from moe_jax.comparison.report import canvas
from moe_jax.comparison.report.words import byte_models
from moe_jax.comparison.results import Result, group_by_arm, lookup
from moe_jax.comparison.statistics import Summary

_NUMBERED_FROM = 8  # arms; with fewer, colours alone tell them apart
_LEGEND_ROWS = 24


def plot_quality(
  directory: pathlib.Path,
  results: Sequence[Result],
  summary: Summary,
  differences: Sequence[Difference],
) -> canvas.Plot | None:
  """Writes the plot, in bits per byte where all results have them, otherwise in perplexity.

  Arms that are not comparable with the first one are hollow, and no part of the front. Arms without experts to
  choose from are horizontal lines, as the byte models are.
  """
  columns = {column.key: column for column in summary.columns}
  quality = next(
    columns[key] for key in ("bits_per_byte", "perplexity") if key in columns and columns[key].judged
  )
  if "max_vio" not in columns:
    return None
  points, lines = {}, {}
  for index, (arm, of_arm) in enumerate(group_by_arm(results).items()):
    pairs = [(columns["max_vio"].value(r), quality.value(r)) for r in of_arm]
    qualities = [y for _, y in pairs if y is not None and np.isfinite(y)]
    pairs = [p for p in pairs if None not in p and np.isfinite(p).all()]
    if qualities and (not pairs or lookup(of_arm[0], "model", "num_experts") == [1]):
      lines[canvas.shorten(arm)] = float(np.mean(qualities))  # a dense model has no balance
    elif pairs:
      points[index] = np.array(pairs)
  if not points:
    return None
  arms = [row.arm for row in summary.rows]
  figure = canvas.figure(5.6, 4.2 if len(points) < _NUMBERED_FROM else 5.4)
  ax = figure.subplots()
  broken = {d.arm for d in differences if d.broken}
  hollow = {index for index in points if arms[index] in broken}
  _draw_points(ax, points, hollow)
  everything = np.concatenate(list(points.values()))
  if not canvas.set_scale(ax, "x", everything[:, 0], ratio=8):
    ax.margins(x=0.08)
  canvas.set_scale(ax, "y", everything[:, 1], ratio=8)
  ax.set_xlabel("MaxVio over the validation set, mean over layers")
  ax.set_ylabel(f"validation {'bits per byte' if quality.key == 'bits_per_byte' else 'perplexity per token'}")
  means = [xy.mean(axis=0) for index, xy in points.items() if index not in hollow]
  front = _draw_front(ax, np.array(means))
  if quality.key == "bits_per_byte":
    lines |= byte_models(summary)
  canvas.draw_yardsticks(ax, lines, reach=0.5)
  numbered = len(points) >= _NUMBERED_FROM
  if numbered:
    _number_points(ax, points)
  _draw_legend(ax, points, arms, hollow, numbered)
  caption = "Quality against balance: down is a better model, left a better balance. "
  if any(len(xy) > 1 for xy in points.values()):
    caption += "Small: one seed each; large: mean, with lines of one sample standard deviation over seeds. "
  if front:
    caption += "Grey steps: the arms that no other beats in both means. "
  if hollow:
    caption += f"Hollow: not comparable with {arms[0]}. "
  return canvas.save(figure, directory / "quality_vs_max_vio.png", caption.strip())


def _draw_points(ax: Any, points: dict[int, np.ndarray], hollow: set[int]) -> None:
  few = len(points) < _NUMBERED_FROM
  for index, xy in points.items():
    look = _marker(index, hollow)
    color, marker = look["color"], look["marker"]
    several = len(xy) > 1
    if several:
      size, alpha = (13, 0.4) if few else (6, 0.3)
      ax.scatter(*xy.T, s=size, color=color, marker=marker, alpha=alpha, lw=0, zorder=2)
    spread = xy.std(axis=0, ddof=1) if several else (None, None)
    bars, cap = (1.0, 2.5) if few else (0.6, 0.0)
    ax.errorbar(*xy.mean(axis=0), xerr=spread[0], yerr=spread[1], elinewidth=bars, capsize=cap, zorder=3,
                **look)  # fmt: skip


def _marker(index: int, hollow: set[int]) -> dict[str, Any]:
  look = canvas.style(index)
  fill, edge = ("white", look["color"]) if index in hollow else (look["color"], "white")
  return {
    "color": look["color"],
    "marker": look["marker"],
    "ls": "",
    "ms": 6,
    "mfc": fill,
    "mec": edge,
    "mew": 1.2 if index in hollow else 0.7,
  }


def _draw_front(ax: Any, means: np.ndarray) -> bool:
  """Draws steps through the means that no other mean beats in both; whether there are two or more of them."""
  if len(means) < 2:
    return False
  beaten = [any((other <= own).all() and (other < own).any() for other in means) for own in means]
  front = means[~np.array(beaten)]
  if len(front) < 2:
    return False
  front = front[np.argsort(front[:, 0])]
  ax.step(*front.T, where="post", color="#bbbbbb", lw=1.2, zorder=1.5)
  return True


def _number_points(ax: Any, points: dict[int, np.ndarray]) -> None:
  """Writes each arm's number where it covers neither a point nor another number, with a line to its point."""
  ax.figure.canvas.draw()  # fixes the scales
  scale = ax.figure.dpi / 72
  at = {index: ax.transData.transform(xy.mean(axis=0)) for index, xy in points.items()}
  taken = [(*xy, 4.0 * scale, 4.0 * scale) for xy in at.values()]  # centre and half sizes of boxes
  frame = ax.get_window_extent()
  for index, xy in sorted(at.items(), key=lambda item: tuple(item[1])):
    half = (2.6 * len(str(index + 1)) + 1.0) * scale, 4.2 * scale
    place = _free_place(xy, half, taken, frame, scale)
    taken.append((*place, *half))
    color = canvas.style(index)["color"]
    inverse = ax.transData.inverted()
    if np.hypot(*(place - xy)) > 13 * scale:
      line = inverse.transform([xy, place])
      ax.plot(*line.T, color=color, lw=0.5, alpha=0.7, zorder=2.5)
    ax.text(*inverse.transform(place), str(index + 1), color=color, fontsize=7.5, ha="center", va="center",
            zorder=4, bbox={"boxstyle": "square,pad=0.05", "fc": "white", "ec": "none", "alpha": 0.8})  # fmt: skip


def _free_place(
  xy: np.ndarray, half: tuple[float, float], taken: list, frame: Any, scale: float
) -> np.ndarray:
  """Returns the centre nearest to `xy` at which a box of `half` sizes meets no taken box; all in pixels."""
  boxes = np.array(taken)
  for radius in np.arange(9.0, 120.0, 3.0) * scale:
    for angle in np.linspace(0.25, 0.25 + 2, 16, endpoint=False) * np.pi:
      place = xy + radius * np.array([np.cos(angle), np.sin(angle)])
      inside = frame.x0 < place[0] - half[0] and place[0] + half[0] < frame.x1
      inside &= frame.y0 < place[1] - half[1] and place[1] + half[1] < frame.y1
      gaps = np.abs(boxes[:, :2] - place) - boxes[:, 2:] - half
      if inside and (gaps > 0).any(axis=1).all():
        return place
  return xy + np.array([9.0, 9.0]) * scale


def _draw_legend(
  ax: Any, points: dict[int, np.ndarray], arms: Sequence[str], hollow: set[int], numbered: bool
) -> None:
  from matplotlib.lines import Line2D

  handles = []
  for index in points:
    label = f"{index + 1}  {canvas.shorten(arms[index])}" if numbered else canvas.shorten(arms[index])
    handles.append(Line2D([], [], label=label, **_marker(index, hollow)))
  ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.02), borderaxespad=0.0, handletextpad=0.3,
            fontsize=8 if len(points) <= _LEGEND_ROWS else 7.5, ncols=-(-len(points) // _LEGEND_ROWS),
            columnspacing=1.0)  # fmt: skip
