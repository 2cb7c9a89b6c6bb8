"""From the result files of a comparison to a terminal table, summary.csv, plots and one report.html.

A comparison is a run folder with one folder per arm (method) and seed:
`<run>/arms/<arm_slug>/seed_<k>/result.json` and `metrics.jsonl` beside it. Results are plain dicts; a key
that is missing is shown as "-". Nothing here imports jax.
"""

from moe_jax.comparison.differences import Difference, paired_differences
from moe_jax.comparison.report.html import write_report
from moe_jax.comparison.report.markdown import markdown_table
from moe_jax.comparison.report.stored import FILES, TRIED, Stored, read_stored, write_csv
from moe_jax.comparison.report.tables import print_differences, print_table
from moe_jax.comparison.results import load_results
from moe_jax.comparison.statistics import (
  Column,
  Row,
  Stat,
  Summary,
  columns_of,
  summarise,
)

__all__ = [
  "FILES",
  "TRIED",
  "Column",
  "Difference",
  "Row",
  "Stat",
  "Stored",
  "Summary",
  "columns_of",
  "load_results",
  "markdown_table",
  "paired_differences",
  "print_differences",
  "print_table",
  "read_stored",
  "summarise",
  "write_csv",
  "write_report",
]
