"""The plots of a comparison as PNG files: curves over steps here, the others beside."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.comparison.differences import Difference
from moe_jax.comparison.report import canvas, heatmaps, pareto, words
from moe_jax.comparison.results import Result
from moe_jax.comparison.statistics import Row, Summary, number

Metrics = Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]


def write_plots(
  directory: pathlib.Path,
  results: Sequence[Result],
  summary: Summary,
  differences: Sequence[Difference],
  metrics: Metrics,
) -> list[canvas.Plot]:
  """Writes every plot that the results have the numbers for.

  Args:
    directory: where the PNG files go.
    results: as from `load_results`.
    summary: their summary.
    differences: from the first arm.
    metrics: (arm, seed) -> lines of metrics.jsonl.
  """
  from matplotlib import rc_context

  with rc_context(canvas.RC):
    plots = [
      _plot_max_vio(directory, summary.rows, metrics),
      pareto.plot_quality(directory, results, summary, differences),
      _plot_loss(directory, results, summary, metrics),
      heatmaps.plot_load(directory, results),
      heatmaps.plot_domains(directory, results),
    ]
  return [plot for plot in plots if plot is not None]


def _curves(metrics: Metrics, arms: Sequence[str], key: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
  """arm index -> (steps [n], values [seeds, n]) at the steps that all seeds of the arm have; layers are averaged."""
  curves = {}
  for index, arm in enumerate(arms):
    seeds = []
    for (name, _), lines in metrics.items():
      values = {line["step"]: line[key] for line in lines if key in line} if name == arm else {}
      values = {step: [number(x) for x in np.ravel(np.asarray(v, object))] for step, v in values.items()}
      values = {step: float(np.mean(v)) for step, v in values.items() if v and None not in v}
      if values:
        seeds.append(values)
    if seeds:
      steps = sorted(set.intersection(*(set(s) for s in seeds)))
      if steps:
        curves[index] = np.array(steps), np.array([[s[step] for step in steps] for s in seeds])
  return curves


def _draw_curves(ax: Any, curves: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> None:
  """Mean line over seeds with a band from the lowest to the highest seed."""
  alpha = 0.16 if len(curves) <= 6 else 0.08  # many bands on each other hide the lines
  for index, (steps, values) in curves.items():
    look = canvas.style(index)
    marker = look["marker"] if len(steps) == 1 else None
    mean = values.mean(axis=0)
    ax.plot(steps, mean, color=look["color"], linestyle=look["linestyle"], marker=marker, lw=1.5, zorder=3)
    if len(values) > 1:
      ax.fill_between(
        steps, values.min(axis=0), values.max(axis=0), color=look["color"], alpha=alpha, lw=0, zorder=2
      )


def _label_ends(ax: Any, curves: Mapping[int, tuple[np.ndarray, np.ndarray]], arms: Sequence[str]) -> None:
  """Names each line at its right end, moved apart where they would overlap, with a thin leader to the line."""
  low, high = ax.get_ylim()
  step = 0.135 / (ax.figure.get_figheight() * ax.get_position().height)  # height of a label / of the axes
  ends = []
  for index, (_, values) in curves.items():
    mean = values.mean(axis=0)
    mean = mean[np.isfinite(mean)]
    end = float(np.clip(mean[-1], low, high)) if mean.size else low
    height = float(ax.transLimits.transform((0, ax.transScale.transform((1, end))[1]))[1])
    ends.append((height, index))
  ends.sort()
  heights = np.array([height for height, _ in ends])
  for _ in range(200):  # push neighbours apart until all are a label's height from each other
    gaps = np.diff(heights)
    close = np.flatnonzero(gaps < step - 1e-6)
    if not close.size:
      break
    for i in close:
      push = (step - (heights[i + 1] - heights[i])) / 2
      if push > 0:
        heights[i] -= push
        heights[i + 1] += push
  for (end, index), height in zip(ends, heights, strict=True):
    look = canvas.style(index)
    ax.plot([1.005, 1.03, 1.07], [end, height, height], transform=ax.transAxes, clip_on=False, lw=1.0,
            color=look["color"], linestyle=look["linestyle"])  # fmt: skip
    ax.text(
      1.08,
      height,
      canvas.shorten(arms[index]),
      transform=ax.transAxes,
      va="center",
      fontsize=8,
      color=look["color"],
    )


def _seeds_words(rows: Sequence[Row]) -> str:
  if all(len(row.seeds) == 1 for row in rows):
    return "One seed per arm."
  return "Line: mean over seeds; band: lowest to highest seed."


def _all_values(curves: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
  return np.concatenate([values.ravel() for _, values in curves.values()])


def _plot_max_vio(directory: pathlib.Path, rows: Sequence[Row], metrics: Metrics) -> canvas.Plot | None:
  arms = [row.arm for row in rows]
  curves = _curves(metrics, arms, "max_vio")
  if not curves:
    return None
  figure = canvas.figure(6.2, max(3.4, 0.15 * len(arms)))
  ax = figure.subplots()
  _draw_curves(ax, curves)
  if not canvas.set_scale(ax, "y", _all_values(curves), ratio=8):
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
  ax.set_xlabel("training step")
  ax.set_ylabel("MaxVio per batch, mean over layers")
  ax.margins(x=0.01)
  _label_ends(ax, curves, arms)
  text = "Load imbalance of training batches, MaxVio = max(load)/mean(load) - 1, 0 = balanced. "
  return canvas.save(figure, directory / "max_vio.png", text + _seeds_words(rows))


def _bits_per_byte(results: Sequence[Result], summary: Summary) -> list[float] | None:
  """What a loss in nats per token of each arm is multiplied with; None if it is not one of bytes in all arms."""
  sizes = {str(r["arm"]): r["bytes_per_token"] for r in results if r.get("bytes_per_token")}
  known = all(
    row.cells.get("bits_per_byte") and row.arm in sizes for row in summary.rows
  )  # not of masked tokens
  return [1 / (math.log(2) * sizes[row.arm]) for row in summary.rows] if known else None


def _plot_loss(
  directory: pathlib.Path, results: Sequence[Result], summary: Summary, metrics: Metrics
) -> canvas.Plot | None:
  arms = [row.arm for row in summary.rows]
  curves = _curves(metrics, arms, "loss")
  if not curves:
    return None
  factors = _bits_per_byte(results, summary)
  if factors:
    curves = {i: (steps, values * factors[i]) for i, (steps, values) in curves.items()}
  figure = canvas.figure(8.6, max(3.2, 0.15 * len(arms)))
  whole, end = figure.subplots(1, 2, gridspec_kw={"wspace": 0.2})
  _draw_curves(whole, curves)
  first, last = min(s[0] for s, _ in curves.values()), max(s[-1] for s, _ in curves.values())
  cut = first + (last - first) * 2 / 3
  tails = {i: (s[s >= cut], v[:, s >= cut]) for i, (s, v) in curves.items() if (s >= cut).any()}
  _draw_curves(end, tails)
  whole.set_title("whole run", loc="left")
  end.set_title("last third", loc="left")
  for ax in (whole, end):
    ax.set_xlabel("training step")
    ax.margins(x=0.01)
  whole.set_ylabel(f"training loss, {'bits per byte' if factors else 'nats/token'}")
  if factors:
    for ax, drawn in ((whole, curves), (end, tails)):
      means = [values.mean(axis=0) for _, values in drawn.values()]
      canvas.draw_yardsticks(ax, words.byte_models(summary), note=False, curves=means)
  _label_ends(end, tails, arms)
  text = "Training loss of each logged batch; at right the last third of training on its own scale. "
  return canvas.save(figure, directory / "loss.png", text + _seeds_words(summary.rows), wide=True)
