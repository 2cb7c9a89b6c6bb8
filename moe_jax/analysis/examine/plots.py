"""The pictures of an examination."""

import pathlib
from typing import Any

import numpy as np

from moe_jax.analysis.examine.examination import FACTORS, Examination
from moe_jax.comparison.report import canvas

NUM_LAYERS = 3  # of which there are pictures by themselves: the first, one in the middle, and the last


def write_plots(folder: pathlib.Path, found: Examination) -> list[canvas.Plot]:
  """Draws all pictures into a folder."""
  import matplotlib

  with matplotlib.rc_context(canvas.RC):
    plots = [
      plot_load(folder / "load.png", found),
      plot_information(folder / "information.png", found),
      plot_domains(folder / "domains.png", found),
      plot_pairs(folder / "pairs.png", found),
      plot_drops(folder / "drops.png", found),
    ]
  return [plot for plot in plots if plot is not None]


def layers_shown(num_layers: int) -> list[int]:
  """Returns the first layer, one in the middle and the last one."""
  return sorted({0, num_layers // 2, num_layers - 1})[:NUM_LAYERS]


def plot_load(path: pathlib.Path, found: Examination) -> canvas.Plot:
  """Load of each expert relative to balance; layers from top to bottom."""
  loads = [found.load_E(layer) for layer in range(len(found.layers))]
  relative = np.full((len(loads), max(map(len, loads))), np.nan)
  for layer, load_E in enumerate(loads):
    relative[layer, : len(load_E)] = load_E / max(load_E.mean(), 1e-9)
  figure = canvas.figure(7.6, float(np.clip(0.22 * len(relative) + 1.2, 1.8, 7.0)))
  ax = figure.subplots()
  image = _image(ax, relative, 0.0, min(max(2.0, float(np.nanmax(relative))), 4.0), "RdBu_r", centre=1.0)
  ax.set_xlabel("expert")
  ax.set_ylabel("layer")
  _bar(figure, image, ax, "load / mean load")
  return canvas.save(
    figure, path, "Load of each expert. White: its fair share; blue: less; red: more.", wide=True
  )


def plot_information(path: pathlib.Path, found: Examination) -> canvas.Plot:
  """What the choice of an expert tells, by layer."""
  rows = found.rows()
  figure = canvas.figure(7.6, 2.6)
  balance, tells = figure.subplots(1, 2, gridspec_kw={"wspace": 0.25})
  layers = [row["layer"] for row in rows]
  balance.plot(layers, [row["max_vio"] for row in rows], color=canvas.style(0)["color"], marker="o", ms=3)
  balance.set_ylim(bottom=0)
  balance.set_ylabel("MaxVio")
  for i, name in enumerate(("domain", "token", "position")):
    look = canvas.style(i + 1)
    values = [row[f"information_{name}"] for row in rows]
    tells.plot(layers, values, color=look["color"], marker="o", ms=3, label=name)
  tells.set_ylabel("mutual information, nats")
  tells.set_ylim(bottom=0)
  tells.legend(fontsize=8)
  for ax in (balance, tells):
    ax.set_xlabel("layer")
    ax.xaxis.get_major_locator().set_params(integer=True)
  text = "Balance by layer, and what an expert tells of the domain, the token and the position that it was chosen for."
  return canvas.save(figure, path, text, wide=True)


def plot_domains(path: pathlib.Path, found: Examination) -> canvas.Plot | None:
  """Where the tokens of each domain go, in three layers; None if there is one domain."""
  if len(found.domains) < 2:
    return None
  shown = layers_shown(len(found.layers))
  figure = canvas.figure(2.9 * len(shown) + 0.9, float(np.clip(0.25 * len(found.domains) + 1.0, 1.6, 5.0)))
  axes = figure.subplots(1, len(shown), squeeze=False)[0]
  shares = []
  for layer in shown:
    counts_SE = found.layers[layer].by_domain_SE
    shares.append(counts_SE / np.maximum(counts_SE.sum(axis=1, keepdims=True), 1) * counts_SE.shape[1])
  top = max(2.0, *(float(s.max()) for s in shares))
  for ax, layer, share in zip(axes, shown, shares, strict=True):
    image = _image(ax, share, 0.0, min(top, 6.0), "RdBu_r", centre=1.0)
    ax.set_title(f"layer {layer}", loc="left")
    ax.set_xlabel("expert")
    ax.set_yticks(
      range(len(found.domains)), [canvas.shorten(d, 14) for d in found.domains] if ax is axes[0] else []
    )
  _bar(figure, image, list(axes), "share x E")
  text = "Share of a domain's assignments that each expert takes, times the number of experts. Rows that differ show specialisation."
  return canvas.save(figure, path, text, wide=True)


def plot_pairs(path: pathlib.Path, found: Examination) -> canvas.Plot:
  """Which experts are chosen together, and one after the other, against independent choices."""
  layers = layers_shown(len(found.layers))
  pairs = [(f"together, layer {i}", _lift(found, i, i, found.layers[i].together_XE)) for i in layers]
  pairs += [
    (f"layer {i}, then {i + 1}", _lift(found, i, i + 1, found.layers[i + 1].before_XE)) for i in layers[:-1]
  ]
  columns = min(3, len(pairs))
  figure = canvas.figure(2.7 * columns + 0.9, 2.5 * -(-len(pairs) // columns))
  axes = figure.subplots(
    -(-len(pairs) // columns), columns, squeeze=False, gridspec_kw={"hspace": 0.45}
  ).ravel()
  for ax, (title, lift) in zip(axes, pairs, strict=False):
    image = _image(ax, lift, 0.0, 4.0, "RdBu_r", centre=1.0)
    ax.set_title(title, loc="left")
  for ax in axes[len(pairs) :]:
    ax.remove()
  _bar(figure, image, list(axes[: len(pairs)]), "observed / independent")
  text = (
    "Pairs of experts that one token is sent to, relative to independent choices: in one layer (rows and columns are its "
    "experts), and from a layer (rows) to the next (columns)."
  )
  return canvas.save(figure, path, text, wide=True)


def _lift(found: Examination, layer: int, following: int, pairs_XE: np.ndarray) -> np.ndarray:
  """Returns observed pairs / those of independent choices with the same loads; NaN for a pair of one expert."""
  one, other = (np.diagonal(found.layers[i].together_XE) for i in (layer, following))  # tokens, as pairs are
  pairs_XE = pairs_XE.copy()
  chance_XE = one[:, None] * other[None, :]
  if layer == following:
    np.fill_diagonal(chance_XE, 0)
    np.fill_diagonal(pairs_XE, 0)
  if not pairs_XE.sum():
    return np.full(pairs_XE.shape, np.nan)
  chance_XE *= pairs_XE.sum() / max(chance_XE.sum(), 1e-9)
  return np.divide(pairs_XE, chance_XE, out=np.full(pairs_XE.shape, np.nan), where=chance_XE > 0)


def plot_drops(path: pathlib.Path, found: Examination) -> canvas.Plot:
  """What a capacity factor would drop."""
  dropped = np.array([[found.dropped(i, f) for f in FACTORS] for i in range(len(found.layers))])
  figure = canvas.figure(4.6, 2.8)
  ax = figure.subplots()
  for row in dropped:
    ax.plot(FACTORS, row, color="#bbbbbb", lw=0.7)
  ax.plot(FACTORS, dropped.mean(axis=0), color=canvas.style(1)["color"], marker="o", ms=3.5, label="mean")
  ax.set_xscale("log")
  ticks = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
  ax.set_xticks(ticks, [f"{factor:g}" for factor in ticks])
  ax.minorticks_off()
  ax.set_ylim(bottom=0)
  ax.set_xlabel("capacity factor")
  ax.set_ylabel("share of assignments dropped")
  ax.legend(fontsize=8)
  text = "What a capacity would drop, if a window were a routing group. Grey: each layer."
  return canvas.save(figure, path, text)


def _image(ax: Any, values: np.ndarray, low: float, high: float, cmap: str, centre: float) -> Any:
  from matplotlib.colors import TwoSlopeNorm
  from matplotlib.ticker import MaxNLocator

  image = ax.imshow(
    values, aspect="auto", interpolation="nearest", cmap=cmap, norm=TwoSlopeNorm(centre, low, high)
  )
  ax.grid(False)
  ax.spines[:].set_visible(False)
  ax.tick_params(length=2, labelsize=8)
  for axis in (ax.xaxis, ax.yaxis):
    axis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
  return image


def _bar(figure: Any, image: Any, axes: Any, label: str) -> None:
  bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=28, fraction=0.03, extend="max", extendfrac=0.03)
  bar.set_label(label)
  bar.outline.set_visible(False)
