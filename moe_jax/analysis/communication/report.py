"""Tables, CSV files and plots of the communication study.

A row is a dict: an arm under one `once_per`, with the numbers of `simulate.summary`, bytes and seconds
of one layer as means over layers and simulated steps.
"""

import csv
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax import disk
from moe_jax.comparison.report import canvas

Row = Mapping[str, Any]
PER_DEVICE = ("sent_bytes_P", "received_bytes_P")


def write_csv(folder: pathlib.Path, rows: Sequence[Row]) -> None:
  """summary.csv: a line per row; devices.csv: a line per row and device. Bytes and seconds at full precision."""
  plain = [{k: v for k, v in row.items() if k not in PER_DEVICE} for row in rows]
  _write(folder / "summary.csv", plain)
  sides = lambda row: zip(*(row[name] for name in PER_DEVICE), strict=True)
  _write(
    folder / "devices.csv",
    [
      {
        "arm": r["arm"],
        "once_per": r["once_per"],
        "device": i,
        "sent_bytes": sent,
        "received_bytes": received,
      }
      for r in rows
      for i, (sent, received) in enumerate(sides(r))
    ],
  )


def _write(path: pathlib.Path, lines: Sequence[Row]) -> None:
  with disk.whole_text(path) as file:
    writer = csv.DictWriter(file, lines[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)


def print_tables(rows: Sequence[Row], console: Any) -> None:
  """A table per `once_per`, an arm per line."""
  from rich import box
  from rich.table import Table

  for once_per, of_mode in _by_mode(rows).items():
    title = f"A row travels once per {once_per}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for i, name in enumerate(HEADER):
      # Where the terminal is narrow, long names are folded and numbers stay whole.
      table.add_column(name, justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
    for row in of_mode:
      table.add_row(*_cells(row))
    console.print(table)
  console.print(NOTE, style="dim")


HEADER = ("arm", "network", "local", "receive", "exchange", "compute", "shadow", "step", "kept")
NOTE = (
  "Of one layer, means over layers and steps. network, local: MB that a device sends in one dispatch, mean over "
  "devices. receive: what the device that receives most gets, over the mean. exchange: ms of all four exchanges of a "
  "step, by the busiest link. compute: ms of the device with most rows. shadow: ms of copied experts' weights and "
  "gradients. step: the sum of the three. kept: share of the choices without a limit."
)


def _cells(row: Row) -> list[str]:
  devices = len(row["sent_bytes_P"])
  milliseconds = lambda name: _short(1e3 * row[name])
  return [
    row["arm"],
    *(_short(row[name] / devices / 1e6) for name in ("network_bytes", "local_bytes")),
    f"{row['received_over_mean']:.2f}",
    *map(milliseconds, ("exchange_seconds", "compute_seconds")),
    milliseconds("shadow_seconds") if row["shadowed"] else "-",
    milliseconds("step_seconds"),
    f"{row['choices_kept']:.0%}",
  ]


def _short(number: float) -> str:
  """At most two decimals, and fewer where four figures are more than enough."""
  return f"{number:.{2 if number < 100 else 1 if number < 1000 else 0}f}"


def _by_mode(rows: Sequence[Row]) -> dict[str, list[Row]]:
  found: dict[str, list[Row]] = {}
  for row in rows:
    found.setdefault(row["once_per"], []).append(row)
  return found


def write_plots(folder: pathlib.Path, rows: Sequence[Row]) -> list[pathlib.Path]:
  """Bytes per device, the busiest link, and, where arms have limits, the modelled step against the limit."""
  from matplotlib import rc_context

  with rc_context(canvas.RC):
    paths = [_plot_devices(folder / "devices.png", rows), _plot_links(folder / "busiest_link.png", rows)]
    if any(row["limit"] for row in rows):
      paths.append(_plot_limits(folder / "step_time.png", rows))
  return paths


def _plot_devices(path: pathlib.Path, rows: Sequence[Row]) -> pathlib.Path:
  modes = _by_mode(rows)
  figure = canvas.figure(8.6, 2.4 * len(modes))
  axes = figure.subplots(
    len(modes), 2, squeeze=False, sharey="row", gridspec_kw={"wspace": 0.08, "hspace": 0.45}
  )
  for line, (once_per, of_mode) in zip(axes, modes.items(), strict=True):
    for ax, side, what in zip(line, PER_DEVICE, ("sent", "received"), strict=True):
      for index, row in enumerate(of_mode):
        look = canvas.style(index)
        megabytes = [count / 1e6 for count in row[side]]
        ax.plot(megabytes, color=look["color"], linestyle=look["linestyle"], marker=look["marker"], ms=3, lw=1.0,
                label=canvas.shorten(row["arm"]))  # fmt: skip
      ax.set_title(f"{what}, once per {once_per}", loc="left")
    line[0].set_ylim(bottom=0)
    line[0].set_ylabel("MB of a dispatch")
  for ax in axes.flat:
    ax.xaxis.get_major_locator().set_params(integer=True)
  for ax in axes[-1]:
    ax.set_xlabel("device")
  axes[0][1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), borderaxespad=0.0, fontsize=8)
  return canvas.save(figure, path, "").path


def _plot_links(path: pathlib.Path, rows: Sequence[Row]) -> pathlib.Path:
  """A group of bars per arm, a bar per `once_per`: milliseconds of the busiest link in one dispatch."""
  modes = _by_mode(rows)
  arms = [row["arm"] for row in next(iter(modes.values()))]
  figure = canvas.figure(6.4, 0.5 + 0.16 * len(arms) * (len(modes) + 1))
  ax = figure.subplots()
  height = 1 / (len(modes) + 1)
  for index, (once_per, of_mode) in enumerate(modes.items()):
    where = [i + (index - (len(modes) - 1) / 2) * height for i in range(len(arms))]
    milliseconds = [1e3 * row["exchange_seconds"] / 4 for row in of_mode]
    bars = ax.barh(
      where, milliseconds, height, color=canvas.style(index + 1)["color"], label=f"once per {once_per}"
    )
    ax.bar_label(bars, [row["busiest_link"].replace(" port", "") for row in of_mode], padding=2, fontsize=6)
  ax.set_yticks(range(len(arms)), [canvas.shorten(arm) for arm in arms])
  ax.invert_yaxis()
  ax.margins(x=0.2)
  ax.set_xlabel("ms of the busiest link in one dispatch, and which it is")
  ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), borderaxespad=0.0, fontsize=8)
  return canvas.save(figure, path, "").path


def _plot_limits(path: pathlib.Path, rows: Sequence[Row]) -> pathlib.Path:
  """A panel per `once_per`: the modelled step against M, and what has no limit as horizontal lines."""
  modes = _by_mode(rows)
  figure = canvas.figure(3.0 * len(modes), 3.0)
  axes = figure.subplots(1, len(modes), squeeze=False, sharey=True, gridspec_kw={"wspace": 0.1})[0]
  for ax, (once_per, of_mode) in zip(axes, modes.items(), strict=True):
    names = dict.fromkeys(row["arm"].partition(" M=")[0] for row in of_mode)
    for index, name in enumerate(names):
      look = canvas.style(index)
      points = [r for r in of_mode if r["arm"].partition(" M=")[0] == name]
      milliseconds = [1e3 * r["step_seconds"] for r in points]
      if points[0]["limit"]:
        ax.plot([r["limit"] for r in points], milliseconds, color=look["color"], marker="o", ms=4, label=name)
      else:
        ax.axhline(milliseconds[0], color=look["color"], linestyle=(0, (4, 2)), lw=1.2, label=name)
    ax.set_title(f"once per {once_per}", loc="left")
    ax.set_xticks(sorted({row["limit"] for row in of_mode if row["limit"]}))
    ax.set_xlabel("limit M")
    ax.set_ylim(bottom=0)
  axes[0].set_ylabel("modelled step of one layer, ms")
  axes[-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), borderaxespad=0.0, fontsize=8)
  return canvas.save(figure, path, "").path
