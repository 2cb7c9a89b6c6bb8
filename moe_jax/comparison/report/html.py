"""One page that holds a whole comparison: no script, no external resource, readable on a phone and in the dark."""

import base64
import json
import os
import pathlib
import re
import struct
from collections.abc import Sequence
from typing import Any

import jinja2
import markupsafe

from moe_jax.comparison.report import canvas, plots, tables
from moe_jax.comparison.report.markdown import write_markdown
from moe_jax.comparison.results import Result, load_config, load_metrics, lookup, warnings
from moe_jax.comparison.statistics import Column, Difference, Row, paired_differences, summarise
from moe_jax.errors import InputError

# What the runs share, and where a result has it.
_FACTS = {
  "Data set": ("dataset",),
  "Data fingerprint": ("fingerprint",),
  "Domains": ("domains",),
  "Entropy rate, nats/token": ("entropy_rate",),
  "Validation floor, nats/token": ("validation_floor",),
  "Validation tokens": ("validation", "num_tokens"),
  "Training steps": ("num_steps",),
  "Tokens per step": ("tokens_per_step",),
  "Parameters": ("num_params",),
  "Active parameters": ("num_active_params",),
  "Tail of training, steps": ("training", "tail_steps"),
  "Device": ("device",),
  "Versions": ("versions",),
}


def write_report(
  run_dir: str | os.PathLike[str],
  results: Sequence[Result],
  *,
  title: str,
  question: str,
  command: str,
  notes: Sequence[str] = (),
) -> dict[str, pathlib.Path]:
  """Writes summary.csv, differences.csv, summary.md, the plots and report.html into the run folder.

  The training curves come from `arms/*/seed_*/metrics.jsonl` and the configuration from config.json, where
  they exist. The first arm of the results is the baseline of the differences.

  Args:
    run_dir: the run folder.
    results: as from `load_results`.
    title: of the page.
    question: what the comparison asks, one sentence.
    command: what reproduces it.
    notes: sentences for the end of the page.

  Returns:
    name -> path: "csv", "differences", "markdown", "html" and one per plot, e.g. "max_vio".

  Raises:
    InputError: there is no result.
  """
  run_dir = pathlib.Path(run_dir)
  if not results:
    raise InputError(f"{run_dir}: no finished arm to report; results are arms/<arm>/seed_<k>/result.json")
  rows = summarise(results)
  differences = paired_differences(results)
  paths = {
    "csv": run_dir / "summary.csv",
    "differences": run_dir / "differences.csv",
    "markdown": run_dir / "summary.md",
    "html": run_dir / "report.html",
  }
  tables.write_csv(paths["csv"], rows)
  tables.write_differences_csv(paths["differences"], differences, baseline=rows[0].arm)
  write_markdown(paths["markdown"], rows, differences, command)
  drawn = plots.write_plots(run_dir, results, rows, load_metrics(run_dir))
  paths |= {plot.path.stem: plot.path for plot in drawn}
  page = (
    _templates()
    .get_template("report.html")
    .render(
      title=title,
      question=question,
      command=command,
      warnings=warnings(run_dir, results),
      results=_results_table(rows),
      plots=[_picture(plot) for plot in drawn],
      baseline=rows[0].arm,
      differences=_with_columns(differences),
      differences_caption=tables.differences_caption(
        rows[0].arm, min((len(d.per_seed) for d in differences), default=0)
      ),
      layers=_layers_table(rows),
      facts=_facts(results),
      config=_config_text(load_config(run_dir)),
      notes=notes,
    )
  )
  paths["html"].write_text(page, encoding="utf-8")
  return paths


def _templates() -> jinja2.Environment:
  found = jinja2.Environment(
    loader=jinja2.PackageLoader("moe_jax.comparison.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
  )
  found.filters["breakable"] = _breakable
  return found


def _breakable(arm: str) -> markupsafe.Markup:
  """A long name may break after the signs that join methods and options."""
  return markupsafe.Markup("<wbr>").join(re.split("(?<=[:,+=])", arm))


def _results_table(rows: Sequence[Row]) -> dict[str, Any]:
  columns = tables.shown_columns(rows)
  same = len({len(row.seeds) for row in rows}) == 1  # then the caption says how many
  lines = []
  for row in rows:
    cells = [] if same else [str(len(row.seeds))]
    cells += [tables.format_stat(row.cells[c.key], c, len(row.seeds)) for c in columns]
    lines.append((row.arm, cells))
  titles = [*([] if same else [("Seeds", "")]), *((c.title, c.unit) for c in columns)]
  return {"columns": titles, "rows": lines, "caption": tables.caption(rows)}


def _layers_table(rows: Sequence[Row]) -> dict[str, Any] | None:
  most = max(len(row.max_vio_layers) for row in rows)
  column = next((c for c in rows[0].columns if c.key == "max_vio"), None)
  if not most or column is None:
    return None
  lines = []
  for row in rows:
    cells = [tables.format_stat(s, column, len(row.seeds)) for s in row.max_vio_layers]
    lines.append((row.arm, cells + ["-"] * (most - len(cells))))
  caption = "MaxVio over the validation set of each layer with experts, counted from 0; ± as above."
  return {"columns": [(f"Layer {i}", "") for i in range(most)], "rows": lines, "caption": caption}


def _picture(plot: canvas.Plot) -> dict[str, Any]:
  data = plot.path.read_bytes()
  width, height = struct.unpack(">II", data[16:24])  # where PNG has them; the page then reserves the space
  encoded = base64.b64encode(data).decode("ascii")
  return {"caption": plot.caption, "wide": plot.wide, "base64": encoded, "width": width, "height": height}


def _with_columns(differences: Sequence[Difference]) -> list[tuple[Difference, Column, str]]:
  return [(d, d.column, tables.format_difference(d)) for d in differences]


def _facts(results: Sequence[Result]) -> list[tuple[str, str]]:
  """(name, value); where results differ, every value."""
  found = []
  for name, path in _FACTS.items():
    values = [lookup(r, *path) for r in results]
    texts = dict.fromkeys(_plain(v) for v in values if v is not None)
    if texts:
      found.append((name, "; ".join(texts)))
  seconds = [lookup(r, "training", "seconds") for r in results]
  if all(isinstance(s, (int, float)) for s in seconds):
    found.append(("Training time", f"{sum(seconds) / 60:.1f} minutes over all arms and seeds"))
  return found


def _config_text(config: dict[str, Any]) -> str:
  return json.dumps(config.get("config", config), indent=2, default=str) if config else ""


def _plain(value: Any) -> str:
  if isinstance(value, dict):
    return ", ".join(f"{key} {_plain(x)}" for key, x in value.items())
  if isinstance(value, (list, tuple)):
    return ", ".join(_plain(x) for x in value)
  if isinstance(value, int) and not isinstance(value, bool):
    return f"{value:,}"
  return f"{value:.5g}" if isinstance(value, float) else str(value)
