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

from moe_jax import disk
from moe_jax.comparison.differences import Difference, paired_differences
from moe_jax.comparison.report import canvas, plots, tables, words
from moe_jax.comparison.report.markdown import markdown_table
from moe_jax.comparison.report.stored import ABOUT, DIFFERENCES, SUMMARY, Stored, about_of, write_stored
from moe_jax.comparison.results import Result, load_config, load_metrics, lookup, warnings
from moe_jax.comparison.statistics import Summary, summarise
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
  "Active width": ("active_width",),
  "Expert capacity": ("slots",),
  "Bytes per token": ("bytes_per_token",),
  "Padding, part of the tokens": ("padded_fraction",),
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
  varies: Sequence[str] = (),
) -> dict[str, pathlib.Path]:
  """Writes summary.csv, differences.csv, about.json, summary.md, the plots and report.html into the run folder.

  The training curves come from `arms/*/seed_*/metrics.jsonl` and the configuration from config.json, where
  they exist. The first arm of the results is the baseline of the differences.

  Args:
    run_dir: the run folder.
    results: as from `load_results`.
    title: of the page.
    question: what the comparison asks, one sentence.
    command: what reproduces it.
    notes: sentences for the end of the page.
    varies: keys of `PROTOCOL` that the question varies, so that arms may differ in them.

  Returns:
    name -> path: "csv", "differences", "about", "markdown", "html" and one per plot, e.g. "max_vio".

  Raises:
    InputError: there is no result.
  """
  run_dir = pathlib.Path(run_dir)
  if not results:
    raise InputError(f"{run_dir}: no finished arm to report; results are arms/<arm>/seed_<k>/result.json")
  summary, differences = summarise(results), paired_differences(results, varies=varies)
  stored = Stored(summary, differences, about_of(results, command, varies))
  write_stored(run_dir, stored)
  names = {"csv": SUMMARY, "differences": DIFFERENCES, "about": ABOUT, "markdown": "summary.md"}
  paths = {name: run_dir / file for name, file in (names | {"html": "report.html"}).items()}
  disk.write_text(paths["markdown"], markdown_table(stored))
  drawn = plots.write_plots(run_dir, results, summary, differences, load_metrics(run_dir))
  paths |= {plot.path.stem: plot.path for plot in drawn}
  page = (
    _templates()
    .get_template("report.html")
    .render(
      title=title,
      question=question,
      command=command,
      warnings=[*filter(None, [words.diverged(summary)]), *warnings(run_dir, results, varies)],
      results=_results_table(summary),
      other_sizes=words.other_sizes(summary),
      plots=[picture(plot) for plot in drawn],
      baseline=summary.rows[0].arm,
      differences=_differences(differences, varies),
      layers=_layers_table(summary),
      facts=_facts(results),
      config=_config_text(load_config(run_dir)),
      notes=notes,
    )
  )
  disk.write_text(paths["html"], page)
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


def _results_table(summary: Summary) -> dict[str, Any]:
  columns = tables.shown_columns(summary)
  titles, rows = tables.cells_of(summary, columns)
  units = [""] * (len(titles) - len(columns) - 1) + [column.unit for column in columns]
  lines = [(row[0], row[1:]) for row in rows]
  head = list(zip(titles[1:], units, strict=True))
  return {"columns": head, "rows": lines, "caption": words.caption(summary, columns)}


def _layers_table(summary: Summary) -> dict[str, Any] | None:
  most = max(len(row.max_vio_layers) for row in summary.rows)
  column = next((c for c in summary.columns if c.key == "max_vio"), None)
  if not most or column is None:
    return None
  lines = []
  for row in summary.rows:
    cells = [tables.format_stat(s, column, len(row.seeds)) for s in row.max_vio_layers]
    lines.append((row.arm, cells + ["-"] * (most - len(cells))))
  caption = "MaxVio over the validation set of each layer with experts, counted from 0; ± as above."
  return {"columns": [(f"Layer {i}", "") for i in range(most)], "rows": lines, "caption": caption}


def _differences(differences: Sequence[Difference], varies: Sequence[str]) -> dict[str, Any] | None:
  """What the page says of differences: the judged ones by quantity, sentences, and all of them by arm."""
  if not differences:
    return None
  row = lambda d: (d, d.column, tables.format_difference(d), tables.format_p(d.p_holm))
  judged = words.judgements(differences)
  sentences = [j.sentence for j in judged if j.sentence] + [words.not_comparable(differences)]
  return {
    "judged": [[row(d) for d in j.differences] for j in judged if j.differences],
    "sentences": [sentence for sentence in sentences if sentence],
    "caption": words.differences_caption(differences, varies),
    "all": [row(d) for d in differences],
  }


def picture(plot: canvas.Plot) -> dict[str, Any]:
  """Returns what plots.html shows of a plot."""
  data = plot.path.read_bytes()
  width, height = struct.unpack(">II", data[16:24])  # where PNG has them; the page then reserves the space
  encoded = base64.b64encode(data).decode("ascii")
  return {"caption": plot.caption, "wide": plot.wide, "base64": encoded, "width": width, "height": height}


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
