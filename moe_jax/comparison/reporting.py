"""Prints the table of a comparison, and writes its report into its folder."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from moe_jax.comparison import report, sweep
from moe_jax.comparison.folder import ComparisonFolder, Result

REPORT_FILE = "report.json"  # title, question, command and notes, from which joined folders have theirs


def write_report(
  folder: ComparisonFolder,
  results: list[Result],
  console: Console,
  varies: Sequence[str] = (),
  swept: Mapping[str, Any] | None = None,
  **texts: Any,
) -> None:
  """Prints the table and writes the report of `results` into the folder. The first arm is the baseline."""
  results = sweep.marked(results, swept or {})
  report.print_table(report.summarise(results), console)
  report.print_differences(report.paired_differences(results, varies=varies), console, varies)
  paths = report.write_report(folder.path, results, varies=varies, **texts)
  console.print(f"report: {paths['html']}", soft_wrap=True, markup=False)
