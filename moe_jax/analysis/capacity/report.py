"""Writes the files of the capacity study."""

import pathlib
from collections.abc import Sequence

from moe_jax.analysis.capacity import plots, tables
from moe_jax.analysis.capacity.study import Setting
from moe_jax.comparison.results import Result


def write(folder: pathlib.Path, results: Sequence[Result], command: str) -> list[str]:
  """Writes capacity.csv, capacity.md, capacity.png and dropped.png.

  Args:
    folder: that of the comparison.
    results: of all arms and seeds of the folder. Those of another study are left out.
    command: what reproduces them.

  Returns:
    Sentences for the notes of the report: where further evaluations are, what is left out, and ST-MoE's figures beside ours.
  """
  results = [result for result in results if Setting.parse(result["arm"])]
  settings = {result["arm"]: Setting.parse(result["arm"]) for result in results}
  found, missing = tables.cells(results, settings), tables.left_out(results, settings)
  tables.write_csv(folder / "capacity.csv", found)
  unit = tables.unit(results)
  tables.write_markdown(folder / "capacity.md", found, unit, command, missing)
  plots.write_plots(folder, found, unit)
  return [FURTHER, *missing, *tables.st_moe_in_words(found)]


FURTHER = "capacity.csv and capacity.md have the evaluations of an arm at the other factors, from the same parameters."
