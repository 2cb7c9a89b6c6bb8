"""The plots of the replay study: MaxVio and bias over steps, and how much the load oscillates."""

import pathlib
from collections.abc import Mapping

import numpy as np

from moe_jax.analysis.replay.replay import Replay, Tail
from moe_jax.comparison.report import canvas

_LEGEND = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.02), "borderaxespad": 0.0, "fontsize": 8}


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
  kernel = np.ones(width)
  return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def plot_max_vio(path: pathlib.Path, replays: Mapping[str, Replay]) -> pathlib.Path:
  figure = canvas.figure(6.4, 3.6)
  ax = figure.subplots()
  for index, (method, result) in enumerate(replays.items()):
    look = canvas.style(index)
    max_vio_I = result.max_vio_IR.mean(axis=1)
    smooth_I = _running_mean(max_vio_I, max(1, len(max_vio_I) // 40))
    ax.plot(result.step_I, max_vio_I, color=look["color"], lw=0.4, alpha=0.25)
    ax.plot(
      result.step_I, smooth_I, color=look["color"], linestyle=look["linestyle"], label=canvas.shorten(method)
    )
  ax.set_ylim(bottom=0)
  ax.set_xlabel("recorded step")
  ax.set_ylabel("MaxVio per batch, mean over layers")
  ax.legend(**_LEGEND)
  return canvas.save(figure, path, "").path


def plot_bias(path: pathlib.Path, replays: Mapping[str, Replay]) -> pathlib.Path:
  """The last layer's bias, a line per expert and a panel per method."""
  shown = {method: result for method, result in replays.items() if result.bias_IRE is not None}
  columns = min(3, max(1, len(shown)))
  rows = max(1, -(-len(shown) // columns))
  figure = canvas.figure(3.0 * columns, 2.3 * rows)
  axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"wspace": 0.3, "hspace": 0.5}).ravel()
  for ax in axes[len(shown) :]:
    ax.remove()
  for ax, (method, result) in zip(axes, shown.items(), strict=False):
    for expert, bias_I in enumerate(result.bias_IRE[:, -1].T):
      ax.plot(result.step_I, bias_I, color=canvas.style(expert)["color"], lw=0.7)
    ax.set_title(canvas.shorten(method), loc="left")
    ax.set_xlabel("recorded step")
  if shown:
    axes[0].set_ylabel("bias of each expert, last layer")
  return canvas.save(figure, path, "").path


def plot_oscillation(
  path: pathlib.Path, method: str, tails: Mapping[tuple[float, int], Tail]
) -> pathlib.Path:
  """Mean and standard deviation of MaxVio over the tail, against the rate of `method` and the batch size.

  Args:
    path: the PNG file.
    method: whose rate it is.
    tails: by (rate, sequences per update).
  """
  quantities = (("max_vio", "MaxVio, mean of the tail"), ("max_vio_std", "MaxVio, std over the tail"))
  words, labels = ("rate", "batch size"), (f"rate of {method}", "batch size, sequences per update")
  figure = canvas.figure(8.0, 5.6)
  axes = figure.subplots(2, 2, gridspec_kw={"wspace": 0.25, "hspace": 0.35})
  for along in (0, 1):  # a row of plots against the rate, and one against the batch size
    for ax, (name, title) in zip(axes[along], quantities, strict=True):
      for index, line in enumerate(sorted({setting[1 - along] for setting in tails})):
        points = sorted((s[along], getattr(tail, name)) for s, tail in tails.items() if s[1 - along] == line)
        look = canvas.style(index)
        ax.plot(*zip(*points, strict=True), color=look["color"], marker=look["marker"], ms=3.5,
                label=f"{words[1 - along]} {line:g}")  # fmt: skip
      ax.set_xscale("log")
      ticks = sorted({setting[along] for setting in tails})
      ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
      ax.minorticks_off()
      ax.set_ylim(bottom=0)
      ax.set_xlabel(labels[along])
      ax.set_ylabel(title)
    axes[along][-1].legend(**_LEGEND)
  return canvas.save(figure, path, "").path
