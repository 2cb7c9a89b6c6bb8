"""A table as files: summary.csv, differences.csv and about.json, and back. That of a sweep also has sweep.csv.

The CSV files have every number at full precision. about.json has what else the table says: columns, facts of the
caption, yardsticks, command, commit, versions and minutes.
"""

import csv
import json
import os
import pathlib
import subprocess
from collections.abc import Sequence
from typing import Any, NamedTuple

from moe_jax import disk
from moe_jax.comparison.differences import Difference
from moe_jax.comparison.results import Result, lookup
from moe_jax.comparison.statistics import Column, Row, Stat, Summary
from moe_jax.comparison.tried import TRIED
from moe_jax.errors import InputError

SUMMARY, DIFFERENCES, ABOUT = FILES = ("summary.csv", "differences.csv", "about.json")
_COLUMN_FIELDS = ("key", "title", "unit", "format", "lower_is_better", "judged")


class Stored(NamedTuple):
  """What the files of a table hold."""

  summary: Summary
  differences: list[Difference]
  about: dict[str, Any]
  tried: Sequence[dict[str, str]] = ()  # the lines of sweep.csv


def write_stored(folder: pathlib.Path, stored: Stored) -> None:
  """Writes the three files. `read_stored` gives the same again, except `Column.value` and `Row.max_vio_layers`."""
  summary = stored.summary
  about = stored.about | {
    "facts": summary.facts,
    "yardsticks": summary.yardsticks,
    "columns": [{name: getattr(c, name) for name in _COLUMN_FIELDS} for c in summary.columns],
  }
  entries = [f"{json.dumps(name)}: {_json(value)}" for name, value in about.items()]
  disk.write_text(folder / ABOUT, "{\n" + ",\n".join(entries) + "\n}\n")
  write_csv(folder / SUMMARY, summary)
  write_differences_csv(folder / DIFFERENCES, stored.differences)


def _json(value: Any) -> str:
  """One line, or one for each entry of a list of objects."""
  if isinstance(value, list) and value and isinstance(value[0], dict):
    return "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in value) + "\n]"
  return json.dumps(value)


def read_stored(folder: str | os.PathLike[str]) -> Stored:
  """Reads what `write_stored` wrote.

  Raises:
    InputError: if a file is missing, or what stands beside the table is not whole.
  """
  folder = pathlib.Path(folder)
  missing = [name for name in FILES if not (folder / name).is_file()]
  if missing:
    raise InputError(f"{folder}: has no {', '.join(missing)}; a comparison writes them with its report")
  about = disk.read_object(folder / ABOUT)
  if about is None:
    raise InputError(f"{folder / ABOUT}: is no whole JSON object; a comparison writes it with its report")
  columns = {entry["key"]: Column(**entry) for entry in about.pop("columns")}
  rows = tuple(_row(line, columns) for line in _lines(folder / SUMMARY))
  summary = Summary(tuple(columns.values()), rows, about.pop("yardsticks"), about.pop("facts"))
  tried = _lines(folder / TRIED) if (folder / TRIED).is_file() else ()
  return Stored(summary, [_difference(line, columns) for line in _lines(folder / DIFFERENCES)], about, tried)


def about_of(results: Sequence[Result], command: str, varies: Sequence[str]) -> dict[str, Any]:
  """Returns what a table must say about its origin, beside its numbers.

  `minutes` are those of training and compilation over all arms and seeds. `commit` is that of the code that
  writes the report, with "-dirty" if files were changed; None outside a git checkout.
  """
  seconds = [lookup(r, "training", name) or 0.0 for r in results for name in ("seconds", "compile_seconds")]
  versions = list(
    {json.dumps(r.get("versions"), sort_keys=True): r.get("versions") for r in results}.values()
  )
  return {
    "command": command,
    "varies": list(varies),
    "commit": _commit(),
    "versions": versions,
    "minutes": round(sum(seconds) / 60, 1),
  }


def _commit() -> str | None:
  command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
  try:
    done = subprocess.run(
      command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
    )
  except (OSError, subprocess.SubprocessError):
    return None
  return done.stdout.strip()


def write_csv(path: str | os.PathLike[str], summary: Summary) -> None:
  """Writes a line per arm: `arm`, `num_seeds`, `seeds`, then `<key>_mean`, `<key>_std` and `<key>_n` per column.

  Numbers have full precision. Unknown values are empty. `max_vio_lowest_layer` and `_highest_layer` are over
  layers. `num_params` counts all parameters.
  """
  names = ["arm", "num_seeds", "seeds"]
  names += [f"{c.key}_{part}" for c in summary.columns for part in ("mean", "std", "n")]
  names += ["max_vio_lowest_layer", "max_vio_highest_layer", "num_params"]
  with disk.whole_text(path) as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(names)
    for row in summary.rows:
      line: list[Any] = [row.arm, len(row.seeds), " ".join(map(str, row.seeds))]
      for column in summary.columns:
        cell = row.cells[column.key]
        line += [None, None, 0] if cell is None else [cell.mean, cell.spread, cell.num]
      line += [*(row.max_vio_range or (None, None)), row.num_params]
      writer.writerow(line)  # None is written as nothing


def write_differences_csv(path: str | os.PathLike[str], differences: Sequence[Difference]) -> None:
  """Writes a line per arm and quantity, at full precision.

  `low` and `high` bound the 95% interval of the mean, and `p_value` is that of the paired t test, both for this
  cell alone; they are empty with fewer than two shared seeds. `p_holm` is corrected over the judged cells, and
  empty where the cell is not judged. `seed_<k>` is the arm minus the baseline at seed k.
  """
  seeds = sorted({seed for difference in differences for seed in difference.per_seed})
  names = ["arm", "baseline", "quantity", "num_seeds", "mean", "standard_error", "degrees_of_freedom"]
  names += ["p_value", "p_holm", "low", "high", "verdict", *(f"seed_{seed}" for seed in seeds)]
  with disk.whole_text(path) as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(names)
    for d in differences:
      line = [d.arm, d.baseline, d.key, len(d.per_seed), d.mean, d.standard_error, d.degrees_of_freedom]
      line += [d.p_value, d.p_holm, *(d.interval or (None, None)), d.verdict]
      writer.writerow([*line, *(d.per_seed.get(seed) for seed in seeds)])


def _lines(path: pathlib.Path) -> list[dict[str, str]]:
  with path.open(encoding="utf-8", newline="") as file:
    return list(csv.DictReader(file))


def _number(text: str) -> float | None:
  return float(text) if text else None


def _row(line: dict[str, str], columns: dict[str, Column]) -> Row:
  cells: dict[str, Stat | None] = {}
  for key in columns:
    mean, spread = _number(line[f"{key}_mean"]), _number(line[f"{key}_std"])
    cells[key] = None if mean is None else Stat(mean, spread, int(line[f"{key}_n"]))
  num_params = _number(line.get("num_params", ""))  # which tables of older code lack
  seeds = tuple(map(int, line["seeds"].split()))
  return Row(line["arm"], seeds, cells, num_params=None if num_params is None else int(num_params))


def _difference(line: dict[str, str], columns: dict[str, Column]) -> Difference:
  per_seed = {int(k.removeprefix("seed_")): float(x) for k, x in line.items() if k.startswith("seed_") and x}
  names = ("mean", "standard_error", "p_value", "p_holm", "low", "high")
  n = {name: _number(line[name]) for name in names}
  return Difference(
    arm=line["arm"],
    baseline=line["baseline"],
    column=columns[line["quantity"]],
    per_seed=per_seed,
    mean=n["mean"],
    standard_error=n["standard_error"],
    interval=None if n["low"] is None else (n["low"], n["high"]),
    p_value=n["p_value"],
    p_holm=n["p_holm"],
    verdict=line["verdict"],
  )
