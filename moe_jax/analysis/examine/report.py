"""Writes what an examination found: tables, pictures, numbers, and one page with all of it."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import numpy as np

from moe_jax import disk, locks
from moe_jax.analysis.examine import plots, tables
from moe_jax.analysis.examine.examination import Examination
from moe_jax.comparison.report.html import picture
from moe_jax.errors import InputError
from moe_jax.training import router_trace, trace_files

REPLAY_COLUMNS = (
  ("method", "Method", "s"),
  ("max_vio", "MaxVio", ".3f"),
  ("max_vio_std", "± over updates", ".3f"),
  ("max_vio_summed", "summed", ".3f"),
)


ARRAYS = "examination.npz"
# What is there before it, where an examination was stopped.
_BEFORE = (locks.LOCK, router_trace.FOLDER, "layers.csv", "experts.csv", "replays.csv")


def check_folder(folder: pathlib.Path) -> None:
  """Raises `InputError` unless a folder can be written and is new, empty, or written by an examination, which may have been stopped."""
  disk.check_folder(folder)
  if not folder.exists() or (folder / ARRAYS).exists():
    return
  header = disk.read_object(folder / router_trace.FOLDER / trace_files.HEADER) or {}
  is_of_run = "fingerprint" in header  # router logits that training recorded, which nothing may remove
  others = (p.name for p in folder.iterdir() if p.name not in _BEFORE and not p.name.startswith(disk.WRITING))
  if is_of_run or any(others):
    raise InputError(f"--output_dir={folder}: holds something else; choose another folder")


def write(
  folder: pathlib.Path,
  found: Examination,
  *,
  title: str,
  command: str,
  facts: Mapping[str, str],
  text_of: Callable[[int], str],
  replays: Sequence[Mapping[str, Any]] = (),
  notes: Sequence[str] = (),
) -> pathlib.Path:
  """Writes layers.csv, experts.csv, examination.npz, the pictures and report.html.

  Args:
    folder: where to write. Made if absent.
    found: the examination.
    title: of the page.
    command: that reproduces it.
    facts: what was read, by name.
    text_of: the text of a token id.
    replays: a line for each balancer that was replayed, with the keys of `REPLAY_COLUMNS`.
    notes: sentences for the end of the page.

  Returns:
    The page.
  """
  folder.mkdir(parents=True, exist_ok=True)
  layers, experts = found.rows(), tables.expert_rows(found, text_of)
  tables.write_csv(folder / "layers.csv", layers)
  tables.write_csv(folder / "experts.csv", experts)
  if replays:
    tables.write_csv(folder / "replays.csv", replays)
  write_arrays(folder / ARRAYS, found)
  drawn = plots.write_plots(folder, found)
  page = _page().render(
    title=title,
    command=command,
    facts=facts,
    columns=[name for _, name, _ in tables.COLUMNS],
    layers=[tables.cells(row) for row in layers],
    caption=tables.caption(found),
    plots=[picture(plot) for plot in drawn],
    experts=experts,
    least=tables.LEAST,
    replay_columns=[name for _, name, _ in REPLAY_COLUMNS],
    replays=[[format(row[key], spec) for key, _, spec in REPLAY_COLUMNS] for row in replays],
    notes=notes,
  )
  disk.write_text(folder / "report.html", page)
  return folder / "report.html"


def write_arrays(path: pathlib.Path, found: Examination) -> None:
  """Writes all sums, for notebooks: `numpy.load(path)["layer_3.by_domain_SE"]`."""
  arrays = {
    f"layer_{i}.{name}": np.asarray(value, np.float32)
    for i, sums in enumerate(found.layers)
    for name, value in sums._asdict().items()
  }
  with disk.whole_file(path) as file:
    np.savez_compressed(
      file,
      **arrays,
      num_tokens_B=found.num_tokens_B,
      named_ids=found.named_ids,
      named_counts=found.named_counts,
      domains=np.array(found.domains),
    )


def print_layers(found: Examination, console: Any) -> None:
  """Prints the table of layers."""
  from rich.table import Table

  names = [name for _, name, _ in tables.COLUMNS]
  rows = [tables.cells(row) for row in found.rows()]
  for columns in (range(8), [0, *range(8, len(names))]):
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for i in columns:
      table.add_column(names[i].replace(" ", "\n", 1), justify="right", vertical="bottom")
    for row in rows:
      table.add_row(*(row[i] for i in columns))
    console.print(table)
    console.print()
  console.print(tables.caption(found), style="dim", markup=False, highlight=False)


def _page() -> jinja2.Template:
  loaders = [
    jinja2.PackageLoader("moe_jax.analysis.examine"),
    jinja2.PackageLoader("moe_jax.comparison.report"),  # whose style sheet the page uses
  ]
  found = jinja2.Environment(
    loader=jinja2.ChoiceLoader(loaders),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  return found.get_template("examination.html")
