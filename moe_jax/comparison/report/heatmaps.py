"""Heat maps of a comparison: load per layer and expert, and where each domain's tokens go."""

import pathlib
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moe_jax.comparison.report import canvas
from moe_jax.comparison.results import Result, group_by_arm, lookup
from moe_jax.comparison.statistics import number


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
  """A rectangular list of lists of finite numbers as [rows, columns]; None if it is not one."""
  try:
    array = np.asarray(value, np.float64)
  except (TypeError, ValueError):
    return None
  return array if array.ndim == 2 and array.size and np.isfinite(array).all() else None


def _heatmaps(
  panels: Sequence[tuple[str, np.ndarray, Sequence[str]]],
  row_axis: str,
  bar: str,
  norm: Any,
  cmap: str,
  extend: str,
) -> Any:
  """A grid of heat maps on one colour scale: (title, values [rows, E], row names)."""
  from matplotlib.ticker import MaxNLocator

  columns = min(len(panels), 2 if len(panels) <= 4 else 3)
  lines = -(-len(panels) // columns)
  most = max(values.shape[0] for _, values, _ in panels)
  width = {1: 5.6, 2: 3.9, 3: 2.9}[columns]
  wrap = int(width * 12)
  titles = ["\n".join(textwrap.wrap(canvas.shorten(t, 2 * wrap), wrap)) for t, _, _ in panels]
  title_height = 0.17 * max(t.count("\n") + 1 for t in titles)
  height = float(np.clip(0.24 * most, 0.75, 3.0))
  figure = canvas.figure(columns * width, lines * (height + title_height + 0.3) + 0.5)
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
    ax.set_yticks(range(0, len(names), every), [canvas.shorten(n, 14) for n in names[::every]])
    if i % columns == 0:
      ax.set_ylabel(row_axis)
    else:
      ax.set_yticklabels([])
    if i + columns >= len(panels):
      ax.set_xlabel("expert")
  colours = figure.colorbar(image, ax=list(axes.flat), pad=0.015, aspect=28, fraction=0.03, extend=extend,
                             extendfrac=0.03)  # fmt: skip
  colours.set_label(bar)
  colours.outline.set_visible(False)
  return figure


def plot_load(directory: pathlib.Path, results: Sequence[Result]) -> canvas.Plot | None:
  from matplotlib.colors import TwoSlopeNorm

  panels, seeds = [], set()
  for arm, (result, load) in _first_seeds(
    results, lambda r: _matrix(lookup(r, "validation", "load"))
  ).items():
    layers, experts = load.shape
    panels.append((arm, load * experts, [str(i) for i in range(layers)]))
    seeds.add(result["seed"])
  if not panels:
    return None
  highest = max(float(np.max(values)) for _, values, _ in panels)
  # Beyond 4 times the mean, shades would be spent on one collapsed expert and hide all others.
  top = min(max(highest, 2.0), 4.0)
  extend = "max" if highest > top else "neither"
  figure = _heatmaps(panels, "layer", "load / mean load", TwoSlopeNorm(1.0, 0.0, top), "RdBu_r", extend)
  text = (
    f"Validation load of each expert relative to balance, {_of_seeds(seeds)}. White: balanced; blue: starved."
  )
  return canvas.save(figure, directory / "load_heatmap.png", text, wide=True)


def plot_domains(directory: pathlib.Path, results: Sequence[Result]) -> canvas.Plot | None:
  from matplotlib.colors import Normalize

  panels, seeds = [], set()
  for arm, (result, by_layer) in _first_seeds(
    results, lambda r: lookup(r, "validation", "load_by_domain")
  ).items():
    information = [number(x) for x in lookup(result, "validation", "mutual_information") or []]
    layer = max(range(len(information)), key=lambda i: information[i] or 0.0) if information else 0
    shares = _matrix(by_layer[layer]) if layer < len(by_layer) else None
    if shares is not None:
      names = [str(d) for d in result.get("domains") or range(len(shares))]
      panels.append((f"{arm} (layer {layer})", shares, names[: len(shares)]))
      seeds.add(result["seed"])
  if not panels or max(len(values) for _, values, _ in panels) < 2:
    return None  # one domain: nothing to specialise in
  top = max(float(np.max(values)) for _, values, _ in panels)
  figure = _heatmaps(
    panels, "domain", "share of the domain's assignments", Normalize(0.0, top), "cividis", "neither"
  )
  text = (
    f"Where each domain's tokens go, {_of_seeds(seeds)}: share of a domain's assignments per expert, in the layer "
    "with the most mutual information between expert and domain. Rows that differ show specialisation."
  )
  return canvas.save(figure, directory / "domain_heatmap.png", text, wide=True)


def _of_seeds(seeds: set[int]) -> str:
  return f"seed {seeds.pop()}" if len(seeds) == 1 else "lowest seed of each arm"
