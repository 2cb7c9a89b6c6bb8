"""The plots of a comparison as PNG files. One colour and line style per arm throughout.

Figures are made without pyplot: no display, no global state. matplotlib is imported when a plot is made.
"""

import dataclasses
import pathlib
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.report.results import Result, group_by_arm, lookup
from moe_jax.report.statistics import COLUMNS, Row, number

DPI = 150
# Okabe and Ito's palette, safe for colour-blind readers, without its yellow, which white paper swallows.
_COLOURS = ("#222222", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
_MARKERS = ("o", "s", "^", "D")
_LABEL_LENGTH = 34  # longer arm names are cut in the middle in plots; tables have the whole name
_RC = {
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

Metrics = Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Plot:
  path: pathlib.Path
  caption: str


def write_plots(directory: pathlib.Path, results: Sequence[Result], rows: Sequence[Row], metrics: Metrics) -> list[Plot]:
  """Writes every plot that the results have the numbers for.

  Args:
    directory: where the PNG files go.
    results: as from `load_results`.
    rows: their summary.
    metrics: (arm, seed) -> lines of metrics.jsonl.
  """
  import matplotlib

  makers = (_plot_max_vio, _plot_perplexity, _plot_load, _plot_loss, _plot_domains)
  with matplotlib.rc_context(_RC):
    plots = [maker(directory, results, rows, metrics) for maker in makers]
  return [plot for plot in plots if plot is not None]


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


def _figure(width: float, height: float) -> Any:
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
  FigureCanvasAgg(figure)
  return figure


def _save(figure: Any, path: pathlib.Path, caption: str) -> Plot:
  # No software version in the file: the same numbers give the same bytes.
  figure.savefig(path, bbox_inches="tight", pad_inches=0.08, metadata={"Software": None})
  return Plot(path, caption)


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
  for index, (steps, values) in curves.items():
    look = style(index)
    marker = look["marker"] if len(steps) == 1 else None
    mean = values.mean(axis=0)
    ax.plot(steps, mean, color=look["color"], linestyle=look["linestyle"], marker=marker, lw=1.5, zorder=3)
    if len(values) > 1:
      ax.fill_between(steps, values.min(axis=0), values.max(axis=0), color=look["color"], alpha=0.16, lw=0, zorder=2)


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
    look = style(index)
    ax.plot([1.005, 1.03, 1.07], [end, height, height], transform=ax.transAxes, clip_on=False, lw=1.0,
            color=look["color"], linestyle=look["linestyle"])  # fmt: skip
    ax.text(1.08, height, shorten(arms[index]), transform=ax.transAxes, va="center", fontsize=8, color=look["color"])


def _seeds_words(rows: Sequence[Row]) -> str:
  if all(len(row.seeds) == 1 for row in rows):
    return "One seed per arm."
  return "Line: mean over seeds; band: lowest to highest seed."


def _set_scale(ax: Any, axis: str, values: np.ndarray, ratio: float) -> bool:
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


def _all_values(curves: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
  return np.concatenate([values.ravel() for _, values in curves.values()])


def _plot_max_vio(
  directory: pathlib.Path, results: Sequence[Result], rows: Sequence[Row], metrics: Metrics
) -> Plot | None:
  arms = [row.arm for row in rows]
  curves = _curves(metrics, arms, "max_vio")
  if not curves:
    return None
  figure = _figure(6.2, max(3.4, 0.15 * len(arms)))
  ax = figure.subplots()
  _draw_curves(ax, curves)
  if not _set_scale(ax, "y", _all_values(curves), ratio=8):
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
  ax.set_xlabel("training step")
  ax.set_ylabel("MaxVio per batch, mean over layers")
  ax.margins(x=0.01)
  _label_ends(ax, curves, arms)
  text = "Load imbalance of training batches, MaxVio = max(load)/mean(load) - 1, 0 = balanced. "
  return _save(figure, directory / "max_vio.png", text + _seeds_words(rows))


def _plot_loss(
  directory: pathlib.Path, results: Sequence[Result], rows: Sequence[Row], metrics: Metrics
) -> Plot | None:
  arms = [row.arm for row in rows]
  curves = _curves(metrics, arms, "loss")
  if not curves:
    return None
  figure = _figure(8.6, max(3.2, 0.15 * len(arms)))
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
  whole.set_ylabel("training loss, nats/token")
  _label_ends(end, tails, arms)
  text = "Training loss of each logged batch; at right the last third of training on its own scale. "
  return _save(figure, directory / "loss.png", text + _seeds_words(rows))


def _plot_perplexity(
  directory: pathlib.Path, results: Sequence[Result], rows: Sequence[Row], metrics: Metrics
) -> Plot | None:
  get = {column.key: column.value for column in COLUMNS}
  points = {}
  for index, of_arm in enumerate(group_by_arm(results).values()):
    pairs = [(get["max_vio_global"](r), get["perplexity"](r)) for r in of_arm]
    pairs = [p for p in pairs if None not in p and np.isfinite(p).all()]
    if pairs:
      points[index] = np.array(pairs)
  if not points:
    return None
  figure = _figure(5.0, max(3.6, 0.19 * len(rows)))
  ax = figure.subplots()
  for index, xy in points.items():
    look = style(index)
    mean, several = xy.mean(axis=0), len(xy) > 1
    spread = xy.std(axis=0, ddof=1) if several else (None, None)
    if several:
      ax.scatter(*xy.T, s=13, color=look["color"], marker=look["marker"], alpha=0.4, lw=0, zorder=2)
    ax.errorbar(*mean, xerr=spread[0], yerr=spread[1], color=look["color"], marker=look["marker"], ms=6, mec="white",
                mew=0.7, elinewidth=1.0, capsize=2.5, ls="", label=shorten(rows[index].arm), zorder=3)  # fmt: skip
  everything = np.concatenate(list(points.values()))
  if not _set_scale(ax, "x", everything[:, 0], ratio=8):
    ax.margins(x=0.08)
  _set_scale(ax, "y", everything[:, 1], ratio=8)
  ax.set_xlabel("MaxVio over the validation set, mean over layers")
  ax.set_ylabel("validation perplexity per token")
  ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), borderaxespad=0.0, handletextpad=0.4, fontsize=8)
  caption = "Quality against balance: down is a better model, left a better balance. "
  if any(len(xy) > 1 for xy in points.values()):
    caption += "Small: one seed each; large: mean with sample standard deviation over seeds."
  return _save(figure, directory / "perplexity_vs_max_vio.png", caption)


def _first_seeds(results: Sequence[Result], get: Callable[[Result], Any]) -> dict[str, tuple[Result, Any]]:
  """arm -> its lowest seed that has the value, and the value."""
  found = {}
  for arm, of_arm in group_by_arm(results).items():
    having = [(r, get(r)) for r in of_arm]
    having = [(r, value) for r, value in having if value is not None]
    if having:
      found[arm] = having[0]
  return found


def _matrix(value: Any) -> np.ndarray | None:
  """A rectangular list of lists as float [rows, columns]; None if it is not one."""
  try:
    array = np.asarray(value, np.float64)
  except (TypeError, ValueError):
    return None
  return array if array.ndim == 2 and array.size else None


def _heatmaps(
  panels: Sequence[tuple[str, np.ndarray, Sequence[str]]], row_axis: str, bar: str, norm: Any, cmap: str, extend: str
) -> Any:
  """A grid of heat maps on one colour scale: (title, values [rows, E], row names)."""
  from matplotlib.ticker import MaxNLocator

  columns = min(len(panels), 2 if len(panels) <= 4 else 3)
  lines = -(-len(panels) // columns)
  most = max(values.shape[0] for _, values, _ in panels)
  width = {1: 5.6, 2: 3.9, 3: 2.9}[columns]
  wrap = int(width * 12)
  titles = ["\n".join(textwrap.wrap(shorten(t, 2 * wrap), wrap)) for t, _, _ in panels]
  title_height = 0.17 * max(t.count("\n") + 1 for t in titles)
  height = float(np.clip(0.24 * most, 0.75, 3.0))
  figure = _figure(columns * width, lines * (height + title_height + 0.3) + 0.5)
  axes = figure.subplots(lines, columns, squeeze=False)
  figure.subplots_adjust(
    wspace=0.16, hspace=(title_height + 0.3) / height, left=0.09, right=0.99, top=0.97, bottom=0.1
  )
  image = None
  for i, ax in enumerate(axes.flat):
    if i >= len(panels):
      ax.set_axis_off()
      continue
    _, values, names = panels[i]
    image = ax.imshow(values, aspect="auto", interpolation="nearest", cmap=cmap, norm=norm)
    ax.set_title(titles[i], loc="left", fontsize=8.5)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=2, labelsize=8)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    every = -(-len(names) // 10)
    ax.set_yticks(range(0, len(names), every), [shorten(n, 14) for n in names[::every]])
    if i % columns == 0:
      ax.set_ylabel(row_axis)
    else:
      ax.set_yticklabels([])
    if i + columns >= len(panels):
      ax.set_xlabel("expert")
  colours = figure.colorbar(image, ax=list(axes.flat), shrink=1.0, pad=0.015, aspect=28, fraction=0.03, extend=extend)
  colours.set_label(bar)
  colours.outline.set_visible(False)
  return figure


def _plot_load(
  directory: pathlib.Path, results: Sequence[Result], rows: Sequence[Row], metrics: Metrics
) -> Plot | None:
  from matplotlib.colors import TwoSlopeNorm

  panels, seeds = [], set()
  for arm, (result, load) in _first_seeds(results, lambda r: _matrix(lookup(r, "validation", "load"))).items():
    layers, experts = load.shape
    panels.append((arm, load * experts, [str(i) for i in range(layers)]))
    seeds.add(result["seed"])
  if not panels:
    return None
  highest = max(float(np.nanmax(values)) for _, values, _ in panels)
  # Beyond 4 times the mean, shades would be spent on one collapsed expert and hide all others.
  top = min(max(highest, 2.0), 4.0)
  figure = _heatmaps(panels, "layer", "load / mean load (1 = balanced)", TwoSlopeNorm(1.0, 0.0, top), "RdBu_r",
                     "max" if highest > top else "neither")  # fmt: skip
  text = f"Validation load of each expert relative to balance, {_of_seeds(seeds)}. White: balanced; blue: starved."
  return _save(figure, directory / "load_heatmap.png", text)


def _plot_domains(
  directory: pathlib.Path, results: Sequence[Result], rows: Sequence[Row], metrics: Metrics
) -> Plot | None:
  from matplotlib.colors import Normalize

  panels, seeds = [], set()
  for arm, (result, by_layer) in _first_seeds(results, lambda r: lookup(r, "validation", "load_by_domain")).items():
    information = [number(x) for x in lookup(result, "validation", "mutual_information") or []]
    layer = max(range(len(information)), key=lambda i: information[i] or 0.0) if information else 0
    shares = _matrix(by_layer[layer]) if layer < len(by_layer) else None
    if shares is not None:
      names = [str(d) for d in result.get("domains") or range(len(shares))]
      panels.append((f"{arm} (layer {layer})", shares, names[: len(shares)]))
      seeds.add(result["seed"])
  if not panels or max(len(values) for _, values, _ in panels) < 2:
    return None  # one domain: nothing to specialise in
  top = max(float(np.nanmax(values)) for _, values, _ in panels)
  figure = _heatmaps(panels, "domain", "share of the domain's assignments", Normalize(0.0, top), "cividis", "neither")
  text = (
    f"Where each domain's tokens go, {_of_seeds(seeds)}: share of a domain's assignments per expert, in the layer "
    "with the most mutual information between expert and domain. Rows that differ show specialisation."
  )
  return _save(figure, directory / "domain_heatmap.png", text)


def _of_seeds(seeds: set[int]) -> str:
  return f"seed {seeds.pop()}" if len(seeds) == 1 else "lowest seed of each arm"
