"""The same numbers as text: cells, and the tables of the terminal."""

import math
import sys
from collections.abc import Sequence
from typing import Any

from moe_jax.comparison.differences import Difference
from moe_jax.comparison.report.words import (
  caption,
  differences_caption,
  diverged,
  judgements,
  not_comparable,
  other_sizes,
  shown_yardsticks,
)
from moe_jax.comparison.statistics import Column, Stat, Summary

NOT_FINITE = "not finite"  # where a mean would be
_GAP = 1  # spaces between columns of the terminal table, beside the box's own


def format_number(x: float, spec: str, sign: bool = False) -> str:
  """A number in its column's format; very large ones as 1.23e+10."""
  if math.isfinite(x) and abs(x) >= 1e7:
    spec = ".3g"
  return format(x, ("+" if sign else "") + spec)


def format_stat(stat: Stat | None, column: Column, num_seeds: int) -> str:
  """`mean ± spread`, `mean` for one seed, `-` if unknown; says n where some seeds lack the quantity."""
  if stat is None:
    return "-"
  if not math.isfinite(stat.mean):
    return NOT_FINITE
  text = format_number(stat.mean, column.format)
  if stat.spread is not None:
    text += f" ± {format_number(stat.spread, column.format)}"
  return text if stat.num == num_seeds else f"{text} (n={stat.num})"


def shown_columns(summary: Summary) -> list[Column]:
  """Returns all columns, except the excess over a floor that no arm knows."""
  known = lambda column: any(row.cells[column.key] is not None for row in summary.rows)
  return [column for column in summary.columns if column.key != "excess_nll" or known(column)]


def main_columns(summary: Summary) -> list[Column]:
  """Returns what a terminal shows: the judged columns, and speed. All columns are in summary.csv and the report."""
  columns = shown_columns(summary)
  return [c for c in columns if c.judged or c.key == "tokens_per_second" or _drops(summary, c)] or columns


def _drops(summary: Summary, column: Column) -> bool:
  cells = [row.cells[column.key] for row in summary.rows]
  return column.key == "dropped_fraction" and any(cell is not None and cell.mean > 0 for cell in cells)


def cells_of(summary: Summary, columns: Sequence[Column]) -> tuple[list[str], list[list[str]]]:
  """Returns (titles, rows) as text: arms, then yardsticks, each with its name first.

  A column "Seeds" comes second, unless all arms have equally many; then the caption says how many.
  """
  counts = {len(row.seeds) for row in summary.rows}
  titles = ["Arm", *(["Seeds"] if len(counts) > 1 else []), *(column.title for column in columns)]
  rows = []
  for row in summary.rows:
    num = len(row.seeds)
    cells = [format_stat(row.cells[column.key], column, num) for column in columns]
    rows.append([row.arm, *([str(num)] if len(counts) > 1 else []), *cells])
  for name, bits in shown_yardsticks(summary, columns).items():
    cells = [format_number(bits, c.format) if c.key == "bits_per_byte" else "" for c in columns]
    rows.append([name, *([""] if len(counts) > 1 else []), *cells])
  return titles, rows


def format_difference(difference: Difference) -> str:
  """Returns `mean [low, high]`, or `mean` if there is no interval."""
  if not math.isfinite(difference.mean):
    return NOT_FINITE
  signed = lambda x: format_number(x, difference.column.format, sign=True)
  if difference.interval is None:
    return signed(difference.mean)
  low, high = map(signed, difference.interval)
  return f"{signed(difference.mean)} [{low}, {high}]"


def format_p(p: float | None) -> str:
  """Returns a corrected p-value with two digits; `-` if there is none."""
  if p is None:
    return "-"
  if math.isnan(p):
    return "-"
  return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def print_table(summary: Summary, console: Any = None) -> None:
  """Prints the main columns and their caption. What does not fit the width goes to further blocks with the arms again.

  Args:
    summary: as from `summarise`.
    console: a rich Console; None: standard output, 80 columns wide when it is not a terminal.
  """
  columns = main_columns(summary)
  console = console or _standard_output()
  _print_blocks(*cells_of(summary, columns), console)
  for said in filter(None, (diverged(summary), other_sizes(summary))):
    console.print(_text(said, console))
  console.print(_text(caption(summary, columns), console), style="dim")


def print_differences(
  differences: Sequence[Difference], console: Any = None, varies: Sequence[str] = ()
) -> None:
  """Prints what is resolved: a block per judged quantity, or one sentence, and how to read them.

  A block has the arms with a verdict. differences.csv and the report have all.

  Args:
    differences: as from `paired_differences`.
    console: as in `print_table`.
    varies: as given to `paired_differences`.
  """
  if not differences:
    return
  console = console or _standard_output()
  for judgement in judgements(differences):
    if judgement.sentence:
      console.print(_text(judgement.sentence, console))
      continue
    title = f"{judgement.column.title}: difference from {differences[0].baseline}"
    console.print(_text(title, console), style="bold")
    cells = [
      [d.arm, format_difference(d), format_p(d.p_holm), d.verdict]
      for d in judgement.differences
      if d.resolved
    ]
    _print_blocks(["Arm", "Difference", "p", "Verdict"], cells, console)
  if not_comparable(differences):
    console.print(_text(not_comparable(differences), console))
  console.print(_text(differences_caption(differences, varies), console), style="dim")


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
      if any(row[i].plain for i in block):  # a yardstick has one cell
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
