"""The table as Markdown, for pages: every arm with its differences to the first one and their verdicts."""

import os
import pathlib
from collections.abc import Sequence

from moe_jax.comparison.report.tables import format_difference, format_stat, shown_columns
from moe_jax.comparison.statistics import Difference, Row

LEFT_OUT = ("nll", "tokens_per_second")  # perplexity says the one, and the machine decides the other
JUDGED = ("perplexity", "max_vio", "mutual_information")


def write_markdown(
  path: str | os.PathLike[str], rows: Sequence[Row], differences: Sequence[Difference], command: str
) -> None:
  """One line per arm: mean ± spread over seeds, then what the paired differences to the first arm resolve."""
  columns = {column.key: column for column in shown_columns(rows) if column.key not in LEFT_OUT}
  judged = {(d.arm, d.key): d for d in differences}
  of_verdicts = [key for key in JUDGED if key in columns]
  titles = [column.title for column in columns.values()]
  titles += [f"{columns[key].title}: verdict" for key in of_verdicts]
  lines = [f"`{command}`", "", f"| arm | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
  for row in rows:
    cells = [format_stat(row.cells[key], column, len(row.seeds)) for key, column in columns.items()]
    cells += [_verdict(judged.get((row.arm, key))) for key in of_verdicts]
    lines.append(f"| `{row.arm}` | {' | '.join(cells)} |")
  pathlib.Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _verdict(difference: Difference | None) -> str:
  return "baseline" if difference is None else f"{format_difference(difference)}: {difference.verdict}"
