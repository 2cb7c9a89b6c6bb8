"""The same numbers as text: cells, a terminal table, CSV."""

import csv
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from moe_jax.report.statistics import (
  COLUMNS,
  MIN_SEEDS_FOR_VERDICT,
  Column,
  Difference,
  Row,
  Stat,
  chance_of_verdict,
)

MAX_VIO_MEANS = (
  "MaxVio = max(load)/mean(load) - 1 over experts, signed, mean over layers; 0 = balanced, E/K - 1 = every token "
  "goes to the same K of E experts. Global: load counted over the whole validation set. Batch: per training batch, "
  "mean over the tail of training."
)


def format_number(x: float, spec: str, sign: bool = False) -> str:
  """A number in its column's format; very large ones as 1.23e+10."""
  if math.isfinite(x) and abs(x) >= 1e7:
    spec = ".3g"
  return format(x, ("+" if sign else "") + spec)


def format_stat(stat: Stat | None, column: Column, num_seeds: int) -> str:
  """`mean ± spread`, `mean` for one seed, `-` if unknown; says n where some seeds lack the quantity."""
  if stat is None:
    return "-"
  text = format_number(stat.mean, column.format)
  if stat.spread is not None:
    text += f" ± {format_number(stat.spread, column.format)}"
  return text if stat.num == num_seeds else f"{text} (n={stat.num})"


def shown_columns(rows: Sequence[Row]) -> list[Column]:
  """All columns, except the excess over a floor that no arm knows."""
  return [c for c in COLUMNS if c.key != "excess_nll" or any(r.cells[c.key] is not None for r in rows)]


def caption(rows: Sequence[Row]) -> str:
  """What ± is, over how many seeds, and what the columns mean."""
  counts = sorted({len(row.seeds) for row in rows})
  if counts == [1]:
    spread = "One seed per arm, so there is no spread: differences may be chance."
  else:
    n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    spread = f"Mean ± sample standard deviation over {n} seeds."
  return (
    f"{spread} {MAX_VIO_MEANS} Dropped: share of (token, expert) assignments over capacity, which validation and "
    "training set differently. Load entropy: 1 = balanced. Mutual information: between expert and domain."
  )


def differences_caption(baseline: str, num_seeds: int) -> str:
  """How to read the paired differences from `baseline` over `num_seeds` shared seeds."""
  text = f"Arm minus {baseline}, paired by seed: mean ± standard error of the mean. "
  if num_seeds < MIN_SEEDS_FOR_VERDICT:
    return text + f"A verdict needs at least {MIN_SEEDS_FOR_VERDICT} shared seeds."
  return text + (
    "A verdict is given where |mean| > 2 standard errors. Where there is no difference, chance alone passes this in "
    f"{chance_of_verdict(num_seeds):.0%} of cells at {num_seeds} seeds: read single cells with care, most of all in "
    "a large table."
  )


def format_difference(difference: Difference, column: Column) -> str:
  text = format_number(difference.mean, column.format, sign=True)
  if difference.standard_error is not None:
    text += f" ± {format_number(difference.standard_error, column.format)}"
  return text


def print_table(rows: Sequence[Row], console: Any = None) -> None:
  """Prints the table and its caption. Columns that do not fit the width go to further blocks with the arms again.

  Args:
    rows: as from `summarise`.
    console: a rich Console; None: standard output, 80 columns wide when it is not a terminal.
  """
  columns = shown_columns(rows)
  header = ["Arm", "Seeds", *(c.title for c in columns)]
  cells = [[r.arm, str(len(r.seeds)), *(format_stat(r.cells[c.key], c, len(r.seeds)) for c in columns)] for r in rows]
  _print_blocks(header, cells, caption(rows), console)


def print_differences(differences: Sequence[Difference], baseline: str, console: Any = None) -> None:
  """Prints arm, quantity, difference and verdict, one line each."""
  by_key = {c.key: c for c in COLUMNS}
  cells = [
    [d.arm, by_key[d.key].title, format_difference(d, by_key[d.key]), str(len(d.per_seed)), d.verdict]
    for d in differences
  ]
  seeds = min((len(d.per_seed) for d in differences), default=0)
  _print_blocks(
    ["Arm", "Quantity", "Difference", "Seeds", "Verdict"], cells, differences_caption(baseline, seeds), console
  )


def _print_blocks(header: list[str], cells: list[list[str]], text: str, console: Any) -> None:
  from rich.box import SIMPLE_HEAD
  from rich.console import Console
  from rich.table import Table
  from rich.text import Text

  console = console or Console(file=sys.stdout)
  unicode = (console.encoding or "").lower().startswith("utf")

  def plain(string: str) -> Text:  # Text, because an arm's name may look like rich markup
    return Text(string if unicode else string.replace("±", "+/-"))

  arm_width = min(max(len(row[0]) for row in [header, *cells]), max(12, console.width // 3))
  widths = [max(len(plain(row[i])) for row in [header, *cells]) for i in range(len(header))]
  for block in _blocks(widths, console.width, arm_width):
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(plain(header[0]), max_width=arm_width, overflow="fold")
    for i in block:
      table.add_column(plain(header[i]), justify="right", no_wrap=True)
    for row in cells:
      table.add_row(*(plain(row[i]) for i in (0, *block)))
    console.print(table)
    console.print()
  console.print(plain(text), style="dim", soft_wrap=False)


def _blocks(widths: list[int], width: int, arm_width: int) -> list[list[int]]:
  """Column indices 1.. cut into runs that fit beside the arm; each column takes 3 more cells of padding."""
  blocks, used = [[]], arm_width
  for i, cell in enumerate(widths[1:], start=1):
    if blocks[-1] and used + cell + 3 > width:
      blocks.append([])
      used = arm_width
    blocks[-1].append(i)
    used += cell + 3
  return blocks


def write_csv(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
  """One line per arm: `arm`, `num_seeds`, then `<key>_mean`, `<key>_std` and `<key>_n` per column, at full precision.

  Unknown values are empty. `max_vio_global_lowest_layer` and `_highest_layer` are over layers.
  """
  names = ["arm", "num_seeds"]
  names += [f"{c.key}_{part}" for c in COLUMNS for part in ("mean", "std", "n")]
  names += ["max_vio_global_lowest_layer", "max_vio_global_highest_layer"]
  with open(path, "w", encoding="utf-8", newline="") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
      line: list[Any] = [row.arm, len(row.seeds)]
      for column in COLUMNS:
        cell = row.cells[column.key]
        line += ["", "", 0] if cell is None else [cell.mean, "" if cell.spread is None else cell.spread, cell.num]
      writer.writerow(line + list(row.max_vio_range or ("", "")))
