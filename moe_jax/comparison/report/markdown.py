"""The table as Markdown, for pages: every arm with its differences to the first one and their verdicts."""

import os
import pathlib
from collections.abc import Sequence

from moe_jax.comparison.report.tables import format_number, format_stat
from moe_jax.comparison.statistics import COLUMNS, Difference, Row

SHOWN = ("perplexity", "max_vio_global", "max_vio_batch", "dropped_training", "mutual_information")
JUDGED = ("perplexity", "max_vio_global", "mutual_information")


def write_markdown(
  path: str | os.PathLike[str], rows: Sequence[Row], differences: Sequence[Difference], command: str
) -> None:
  """One line per arm: mean ± spread over seeds, then what the paired differences to the first arm resolve."""
  columns = {column.key: column for column in COLUMNS if column.key in SHOWN}
  judged = {(d.arm, d.key): d for d in differences}
  titles = [columns[key].title for key in SHOWN] + [f"{columns[key].title}: verdict" for key in JUDGED]
  lines = [f"`{command}`", "", f"| arm | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
  for row in rows:
    cells = [format_stat(row.cells[key], columns[key], len(row.seeds)) for key in SHOWN]
    cells += [_verdict(judged.get((row.arm, key)), columns[key].format) for key in JUDGED]
    lines.append(f"| `{row.arm}` | {' | '.join(cells)} |")
  pathlib.Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _verdict(difference: Difference | None, spec: str) -> str:
  if difference is None:
    return "baseline"
  mean = format_number(difference.mean, spec, sign=True)
  error = "" if difference.standard_error is None else f" ± {format_number(difference.standard_error, spec)}"
  return f"{mean}{error}: {difference.verdict}"
