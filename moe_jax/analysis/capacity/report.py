"""Writes the files of the capacity study."""

import pathlib
from collections.abc import Sequence

from moe_jax.analysis.capacity import plots, tables
from moe_jax.analysis.capacity.study import Plan
from moe_jax.comparison.results import Result


def write(folder: pathlib.Path, results: Sequence[Result], plan: Plan, command: str) -> list[str]:
  """Writes capacity.csv, capacity.md, capacity.png and dropped.png.

  Args:
    folder: that of the comparison.
    results: of all arms and seeds.
    plan: what the arms are.
    command: what reproduces it.

  Returns:
    Sentences for the notes of the report: what is left out, and ST-MoE's figures beside ours.
  """
  found, missing = tables.cells(results, plan.settings), tables.left_out(results, plan.settings)
  tables.write_csv(folder / "capacity.csv", found)
  unit = tables.unit(results)
  tables.write_markdown(folder / "capacity.md", found, unit, command, missing)
  plots.write_plots(folder, found, unit)
  return missing + tables.st_moe_in_words(found)
