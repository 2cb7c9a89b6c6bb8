"""Quality against balance: a point per arm, the front of arms that no other beats in both, and yardsticks."""

import dataclasses
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.comparison.differences import Difference
from moe_jax.comparison.report import canvas
from moe_jax.comparison.report.stored import Stored
from moe_jax.comparison.report.words import byte_models
from moe_jax.comparison.results import Result, group_by_arm, lookup
from moe_jax.comparison.statistics import Column, Summary
from moe_jax.errors import InputError

_NUMBERED_FROM = 8  # arms; with fewer, colours alone tell them apart
_LEGEND_ROWS = 24
# Facts that tables in one plot must share. One that a table does not have may be another.
_KNOWN = ("dataset", "num_steps", "tokens", "learning_rate", "slots", "num_layers", "model_dim")
_ALIKE = ("eval_batches", "swept")  # those that a table has only where there is something to say


@dataclasses.dataclass(frozen=True)
class Point:
  """An arm in the plot: (MaxVio, quality) of its mean, and what is known of its seeds."""

  arm: str
  mean: np.ndarray  # [2]
  spread: np.ndarray | None  # [2], sample standard deviation; None with one seed
  num_seeds: int
  hollow: bool  # not comparable with the first arm of its table
  seeds: np.ndarray = dataclasses.field(
    default_factory=lambda: np.zeros((0, 2))
  )  # [seeds, 2]; files have none


Points = Mapping[int, Point]  # by the place of the arm, which fixes its colour and number


def plot_quality(
  directory: pathlib.Path,
  results: Sequence[Result],
  summary: Summary,
  differences: Sequence[Difference],
) -> canvas.Plot | None:
  """Writes the plot, in bits per byte where all results have them, otherwise in perplexity.

  Arms that are not comparable with the first one are hollow, and no part of the front. Arms with a diverged seed are left
  out. Arms without experts to choose from are horizontal lines, as the byte models are.
  """
  columns = {column.key: column for column in summary.columns}
  quality = _quality(summary)
  if "max_vio" not in columns:
    return None
  points, lines = {}, {}
  broken = {d.arm for d in differences if d.broken}
  for index, (arm, of_arm) in enumerate(group_by_arm(results).items()):
    if arm in summary.diverged:
      continue  # the mean of the other seeds is not that of the arm
    pairs = [(columns["max_vio"].value(r), quality.value(r)) for r in of_arm]
    qualities = [y for _, y in pairs if y is not None and np.isfinite(y)]
    pairs = [p for p in pairs if None not in p and np.isfinite(p).all()]
    if qualities and (not pairs or lookup(of_arm[0], "model", "num_experts") == [1]):
      lines[canvas.shorten(arm)] = float(np.mean(qualities))  # a dense model has no balance
    elif pairs:
      seeds = np.array(pairs)
      spread = seeds.std(axis=0, ddof=1) if len(seeds) > 1 else None
      points[index] = Point(arm, seeds.mean(axis=0), spread, len(seeds), arm in broken, seeds)
  if not points:
    return None
  path = directory / "quality_vs_max_vio.png"
  lines |= _byte_lines(summary, quality)
  return _plot(path, points, lines, quality, [summary.rows[0].arm], summary.diverged)


def plot_tables(path: pathlib.Path, tables: Mapping[str, Stored]) -> canvas.Plot:
  """Writes one plot of the arms of several stored tables. An arm that two tables have is that of the first.

  Args:
    path: of the picture.
    tables: by name. Their runs must share text, length, learning rate and size of the model, and drop tokens alike.

  Raises:
    InputError: if they do not or a table does not say it, or no arm has MaxVio and quality.
  """
  from matplotlib import rc_context

  (name, first), *others = tables.items()
  quality, points, lines = _quality(first.summary), {}, {}
  for other, stored in others:
    _check_alike({name: first, other: stored})
  known: set[str] = set()
  baselines: dict[str, None] = {}  # of the hollow arms
  lost: dict[str, None] = {}
  for stored in tables.values():
    broken = {d.arm for d in stored.differences if d.broken}
    for row in stored.summary.rows:
      cells = row.cells.get("max_vio"), row.cells[quality.key]
      if row.arm in known or cells[1] is None:
        continue
      if row.arm in stored.summary.diverged or not np.isfinite(cells[1].mean):
        lost[row.arm] = None
        continue
      known.add(row.arm)
      if cells[0] is None:
        lines[canvas.shorten(row.arm)] = cells[1].mean
      else:
        means, spreads = ([getattr(cell, part) for cell in cells] for part in ("mean", "spread"))
        spread = None if None in spreads else np.array(spreads)
        points[len(known) - 1] = Point(row.arm, np.array(means), spread, cells[1].num, row.arm in broken)
        baselines |= {stored.summary.rows[0].arm: None} if row.arm in broken else {}
  if not points:
    raise InputError(f"tables {', '.join(tables)}: no arm has MaxVio and {quality.title}")
  lines |= _byte_lines(first.summary, quality)
  with rc_context(canvas.RC):
    return _plot(path, points, lines, quality, list(baselines), [a for a in lost if a not in known])


def _quality(summary: Summary) -> Column:
  columns = {column.key: column for column in summary.columns}
  return next(
    columns[key] for key in ("bits_per_byte", "perplexity") if key in columns and columns[key].judged
  )


def _check_alike(tables: Mapping[str, Stored]) -> None:
  """Raises `InputError` where two tables do not share what arms of one plot must, or one does not say it."""
  one, other = (_conditions(table) for table in tables.values())
  where = f"tables {' and '.join(tables)}"
  if differ := [key for key in one if None not in (one[key], other[key]) and one[key] != other[key]]:
    raise InputError(f"{where}: differ in {', '.join(differ)}; plot them one by one")
  for name, table in tables.items():
    if unknown := [fact for fact in _KNOWN if fact not in table.summary.facts]:
      raise InputError(f"{where}: {name} does not say its {', '.join(unknown)}; plot them one by one")


def _conditions(table: Stored) -> dict[str, Any]:
  """Returns what tables in one plot must share. The yardsticks are counted on the text, so they tell texts apart."""
  summary = table.summary
  facts = {fact: summary.facts.get(fact) for fact in _KNOWN}
  facts |= {fact: summary.facts.get(fact, []) for fact in _ALIKE}
  return facts | {
    "yardsticks": summary.yardsticks,
    "measure of quality": _quality(summary).key,
    "what varies by design": sorted(table.about.get("varies", [])),
  }


def _byte_lines(summary: Summary, quality: Column) -> dict[str, float]:
  return byte_models(summary) if quality.key == "bits_per_byte" else {}


def _plot(
  path: pathlib.Path,
  points: Points,
  lines: Mapping[str, float],
  quality: Column,
  baselines: Sequence[str],
  lost: Sequence[str],
) -> canvas.Plot:
  numbered = len(points) >= _NUMBERED_FROM
  figure = canvas.figure(5.6, 5.4 if numbered else 4.2)
  ax = figure.subplots()
  _draw_points(ax, points)
  everything = np.concatenate([np.stack([point.mean, *point.seeds]) for point in points.values()])
  if not canvas.set_scale(ax, "x", everything[:, 0], ratio=8):
    ax.margins(x=0.08)
  canvas.set_scale(ax, "y", everything[:, 1], ratio=8)
  ax.set_xlabel("MaxVio over the validation set, mean over layers")
  ax.set_ylabel(f"validation {'bits per byte' if quality.key == 'bits_per_byte' else 'perplexity per token'}")
  front = front_of({index: point.mean for index, point in points.items() if not point.hollow})
  _draw_front(ax, [points[index].mean for index in front])
  canvas.draw_yardsticks(ax, lines, reach=0.5)
  if numbered:
    _number_points(ax, points, front)
  _draw_legend(ax, points, front, numbered)
  explained = _explanation(points, lines, front, baselines, lost)
  place = ax.get_position()
  below = place.y0 - 0.54 / figure.get_figheight()  # inches, under the label of the axis
  figure.text(
    place.x0, below, "\n".join(textwrap.wrap(explained, 84)), va="top", fontsize=7.5, color="#555555"
  )
  caption = f"Quality against balance: down is a better model, left a better balance. {explained}"
  return canvas.save(figure, path, caption.strip())


def _explanation(
  points: Points,
  lines: Mapping[str, float],
  front: Sequence[int],
  baselines: Sequence[str],
  lost: Sequence[str],
) -> str:
  counts = sorted({point.num_seeds for point in points.values()})
  text = ""
  if counts[-1] > 1:
    n = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    with_seeds = any(len(point.seeds) for point in points.values())
    text += f"{'Large points' if with_seeds else 'Points'}: means over {n} seeds; bars: one sample standard deviation. "
    text += "Small points: one seed each. " if with_seeds else ""
  if front:
    text += "Grey line and bold names: the arms that no other beats in both means. "
  if any(point.hollow for point in points.values()):
    first = baselines[0] if len(baselines) == 1 else f"the first arm of its table ({' or '.join(baselines)})"
    text += f"Hollow: not comparable with {first}. "
  if lines:
    text += "Dotted lines: models without routing. "
  if lost:
    text += f"Not drawn, because a seed diverged: {', '.join(lost)}. "
  return text.strip()


def _draw_points(ax: Any, points: Points) -> None:
  few = len(points) < _NUMBERED_FROM
  for index, point in points.items():
    look = _marker(index, point.hollow)
    color, marker = look["color"], look["marker"]
    if len(point.seeds) > 1:
      size, alpha = (13, 0.4) if few else (6, 0.3)
      ax.scatter(*point.seeds.T, s=size, color=color, marker=marker, alpha=alpha, lw=0, zorder=2)
    spread = (None, None) if point.spread is None else point.spread
    bars, cap = (1.0, 2.5) if few else (0.6, 0.0)
    ax.errorbar(*point.mean, xerr=spread[0], yerr=spread[1], elinewidth=bars, capsize=cap, zorder=3, **look)


def _marker(index: int, hollow: bool) -> dict[str, Any]:
  look = canvas.style(index)
  fill, edge = ("white", look["color"]) if hollow else (look["color"], "white")
  return {
    "color": look["color"],
    "marker": look["marker"],
    "ls": "",
    "ms": 6,
    "mfc": fill,
    "mec": edge,
    "mew": 1.2 if hollow else 0.7,
  }


def front_of(means: Mapping[int, np.ndarray]) -> list[int]:
  """Returns the keys of the means that no other mean beats in both, from left to right; [] if there are not two."""
  beaten = lambda own: any((other <= own).all() and (other < own).any() for other in means.values())
  front = sorted((key for key, mean in means.items() if not beaten(mean)), key=lambda key: means[key][0])
  return front if len(front) > 1 else []


def _draw_front(ax: Any, means: Sequence[np.ndarray]) -> None:
  if len(means):
    ax.step(*np.stack(means).T, where="post", color="#999999", lw=1.4, zorder=1.5)


def _number_points(ax: Any, points: Points, front: Sequence[int]) -> None:
  """Writes each arm's number where it covers neither a point nor another number, with a line to its point."""
  ax.figure.canvas.draw()  # fixes the scales
  scale = ax.figure.dpi / 72
  at = {index: ax.transData.transform(point.mean) for index, point in points.items()}
  taken = [(*xy, 4.0 * scale, 4.0 * scale) for xy in at.values()]  # centre and half sizes of boxes
  names = (text.get_window_extent() for text in ax.texts)  # of lines
  taken += [(*np.mean(box, axis=0), box.width / 2, box.height / 2) for box in names]
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
            weight="bold" if index in front else "normal", zorder=4, bbox={"boxstyle": "square,pad=0.05", "fc": "white", "ec": "none", "alpha": 0.8})  # fmt: skip


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


def _draw_legend(ax: Any, points: Points, front: Sequence[int], numbered: bool) -> None:
  from matplotlib.lines import Line2D

  handles = []
  for index, point in points.items():
    name = canvas.shorten(point.arm)
    label = f"{index + 1}  {name}" if numbered else name
    handles.append(Line2D([], [], label=label, **_marker(index, point.hollow)))
  legend = ax.legend(
    handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.02), borderaxespad=0.0, handletextpad=0.3,
    fontsize=8 if len(points) <= _LEGEND_ROWS else 7.5, ncols=-(-len(points) // _LEGEND_ROWS), columnspacing=1.0,
  )  # fmt: skip
  for index, text in zip(points, legend.get_texts(), strict=True):
    if index in front:
      text.set_weight("bold")
