"""From the result files of a comparison to a terminal table, summary.csv, plots and one report.html.

A comparison is a run folder with one folder per arm (method) and seed:
`<run>/arms/<arm_slug>/seed_<k>/result.json` and `metrics.jsonl` beside it. Results are plain dicts; a key
that is missing is shown as "-". Nothing here imports jax.
"""

from moe_jax.comparison.report.html import write_report
from moe_jax.comparison.report.tables import print_differences, print_table, write_csv
from moe_jax.comparison.results import load_results
from moe_jax.comparison.statistics import (
  Column,
  Difference,
  Row,
  Stat,
  columns_of,
  paired_differences,
  summarise,
)

__all__ = [
  "Column",
  "Difference",
  "Row",
  "Stat",
  "columns_of",
  "load_results",
  "paired_differences",
  "print_differences",
  "print_table",
  "summarise",
  "write_csv",
  "write_report",
]
