"""The same numbers as text: cells, a terminal table, CSV."""

import csv
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from moe_jax.comparison.statistics import (
  MIN_SEEDS_FOR_VERDICT,
  Column,
  Difference,
  Row,
  Stat,
  chance_of_verdict,
)

_GAP = 1  # spaces between columns of the terminal table, beside the box's own
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
  return [
    c for c in rows[0].columns if c.key != "excess_nll" or any(r.cells[c.key] is not None for r in rows)
  ]


def caption(rows: Sequence[Row]) -> str:
  """What ± is, over how many seeds, and what the columns mean."""
  counts = sorted({len(row.seeds) for row in rows})
  if counts == [1]:
    spread = "One seed per arm, so there is no spread: differences may be chance."
  else:
    n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    spread = f"Mean ± sample standard deviation over {n} seeds."
  return (
    f"{spread} {MAX_VIO_MEANS} Dropped: share of (token, expert) assignments over capacity, of which validation "
    "and training have their own. Load entropy: 1 = balanced. Mutual information: between expert and domain."
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


def format_difference(difference: Difference) -> str:
  form = difference.column.format
  text = format_number(difference.mean, form, sign=True)
  if difference.standard_error is not None:
    text += f" ± {format_number(difference.standard_error, form)}"
  return text


def print_table(rows: Sequence[Row], console: Any = None) -> None:
  """Prints the table and its caption. Columns that do not fit the width go to further blocks with the arms again.

  Args:
    rows: as from `summarise`.
    console: a rich Console; None: standard output, 80 columns wide when it is not a terminal.
  """
  columns = shown_columns(rows)
  header = ["Arm", "Seeds", *(c.title for c in columns)]
  cells = [
    [r.arm, str(len(r.seeds)), *(format_stat(r.cells[c.key], c, len(r.seeds)) for c in columns)] for r in rows
  ]
  if len({len(r.seeds) for r in rows}) == 1:  # then the caption says how many
    header, cells = header[:1] + header[2:], [line[:1] + line[2:] for line in cells]
  console = console or _standard_output()
  _print_blocks(header, cells, console)
  console.print(_text(caption(rows), console), style="dim")


def print_differences(differences: Sequence[Difference], baseline: str, console: Any = None) -> None:
  """Prints quantity, difference and verdict, a block per arm, and how to read them."""
  if not differences:
    return
  console = console or _standard_output()
  for arm in dict.fromkeys(d.arm for d in differences):
    console.print(_text(f"{arm} minus {baseline}", console), style="bold")
    cells = [[d.column.title, format_difference(d), d.verdict] for d in differences if d.arm == arm]
    _print_blocks(["Quantity", "Difference", "Verdict"], cells, console)
  seeds = min(len(d.per_seed) for d in differences)
  console.print(_text(differences_caption(baseline, seeds), console), style="dim")


def _standard_output() -> Any:
  from rich.console import Console

  return Console(file=sys.stdout)


def _text(string: str, console: Any) -> Any:
  """rich Text, because an arm's name may look like rich markup; plain signs where the output cannot take others."""
  from rich.text import Text

  return Text(string if (console.encoding or "").lower().startswith("utf") else string.replace("±", "+/-"))


def _print_blocks(header: list[str], cells: list[list[str]], console: Any) -> None:
  """Prints blocks of columns that fit the width, each with the first column; `a ± b` is narrowed to `a±b`."""
  from rich.box import SIMPLE_HEAD
  from rich.table import Table

  cells = [[row[0], *(cell.replace(" ± ", "±") for cell in row[1:])] for row in cells]
  titles = [_text(title.replace(" ", "\n") if i else title, console) for i, title in enumerate(header)]
  texts = [[_text(cell, console) for cell in row] for row in cells]
  first = min(max(text.cell_len for text in [titles[0], *(t[0] for t in texts)]), max(12, console.width // 3))
  widths = [
    max(*(len(line) for line in titles[i].plain.split("\n")), *(row[i].cell_len for row in texts))
    for i in range(len(header))
  ]
  for block in _blocks(widths, console.width, first):
    table = Table(box=SIMPLE_HEAD, padding=(0, _GAP, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(titles[0], max_width=first, overflow="fold", vertical="bottom")
    for i in block:
      table.add_column(titles[i], justify="right", no_wrap=True)
    for row in texts:
      table.add_row(*(row[i] for i in (0, *block)))
    console.print(table)
    console.print()


def _blocks(widths: list[int], width: int, first: int) -> list[list[int]]:
  """Column indices 1.. cut into runs that fit beside the first column."""
  between = _GAP + 1  # rich draws the box's blank divider too
  blocks, used = [[]], first
  for i, cell in enumerate(widths[1:], start=1):
    if blocks[-1] and used + between + cell > width:
      blocks.append([])
      used = first
    blocks[-1].append(i)
    used += between + cell
  return blocks


def write_csv(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
  """One line per arm: `arm`, `num_seeds`, then `<key>_mean`, `<key>_std` and `<key>_n` per column, at full precision.

  Unknown values are empty. `max_vio_lowest_layer` and `_highest_layer` are over layers.
  """
  columns = rows[0].columns if rows else ()
  names = ["arm", "num_seeds"]
  names += [f"{c.key}_{part}" for c in columns for part in ("mean", "std", "n")]
  names += ["max_vio_lowest_layer", "max_vio_highest_layer"]
  with open(path, "w", encoding="utf-8", newline="") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
      line: list[Any] = [row.arm, len(row.seeds)]
      for column in columns:
        cell = row.cells[column.key]
        line += (
          ["", "", 0] if cell is None else [cell.mean, "" if cell.spread is None else cell.spread, cell.num]
        )
      writer.writerow(line + list(row.max_vio_range or ("", "")))


def write_differences_csv(
  path: str | os.PathLike[str], differences: Sequence[Difference], baseline: str
) -> None:
  """One line per arm and quantity, at full precision: what an interval or a correction over the table needs.

  `low` and `high` bound the 95% interval of the mean, `p_value` is the uncorrected one of the paired t test; both
  are empty with fewer than two shared seeds. `seed_<k>` is the arm minus the baseline at seed k.
  """
  seeds = sorted({seed for difference in differences for seed in difference.per_seed})
  names = (
    "arm",
    "baseline",
    "quantity",
    "num_seeds",
    "mean",
    "standard_error",
    "degrees_of_freedom",
    "p_value",
  )
  names = (*names, "low", "high", "verdict", *(f"seed_{seed}" for seed in seeds))
  with open(path, "w", encoding="utf-8", newline="") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(names)
    for d in differences:
      line = [
        d.arm,
        baseline,
        d.key,
        len(d.per_seed),
        d.mean,
        d.standard_error,
        d.degrees_of_freedom,
        d.p_value,
      ]
      line += [*(d.interval or (None, None)), d.verdict, *(d.per_seed.get(seed) for seed in seeds)]
      writer.writerow(line)  # None is written as nothing
