"""One page that holds a whole comparison: no script, no external resource, readable on a phone and in the dark."""

import base64
import json
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from moe_jax.comparison.report import canvas, plots, tables
from moe_jax.comparison.report.markdown import write_markdown
from moe_jax.comparison.results import Result, load_config, load_metrics, lookup, warnings
from moe_jax.comparison.statistics import COLUMNS, Difference, Row, paired_differences, summarise
from moe_jax.errors import InputError

_CSS = """
:root { color-scheme: light dark; --fg: #1d1f21; --bg: #fdfdfc; --soft: #5d6268; --line: #d9dbde; --fill: #f2f3f4;
  --mark: #8a4b00; }
@media (prefers-color-scheme: dark) { :root { --fg: #dcdee0; --bg: #17191b; --soft: #9aa0a6; --line: #383c40;
  --fill: #212427; --mark: #f0b35e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.2rem; color: var(--fg); background: var(--bg);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .4rem 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.question { font-size: 1.1rem; color: var(--soft); margin: 0 0 1rem; max-width: 46rem; }
pre { background: var(--fill); border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; margin: 0;
  white-space: pre-wrap; font-size: .85rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
.word, thead th.word { text-align: left; } td > small { display: block; } td.word > small { display: inline; }
tr:last-child > td, tr:last-child > th { border-bottom: 0; } tbody tr + tr.group > * { border-top: 2px solid var(--line); }
thead th { vertical-align: bottom; white-space: normal; overflow-wrap: normal; background: var(--fill); font-weight: 600; }
th small, .note, figcaption, td small { color: var(--soft); font-weight: 400; } th small { display: block; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--bg); white-space: normal;
  overflow-wrap: break-word; max-width: 18rem; font-weight: 600; } thead th:first-child { background: var(--fill); }
tr.resolved td.word { color: var(--mark); font-weight: 600; }
.note, figcaption { font-size: .85rem; margin: .5rem 0; max-width: 60rem; }
.warn { border-left: 3px solid var(--mark); background: var(--fill); padding: .5rem .8rem; margin: 1rem 0; }
.plots { display: flex; flex-wrap: wrap; gap: 1.4rem; align-items: flex-start; }
figure { margin: 0; flex: 1 1 26rem; min-width: min(100%, 20rem); max-width: 60rem; }
figure.wide { flex-basis: 100%; }
img { width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 6px; display: block; }
.facts td { white-space: normal; } summary { cursor: pointer; } details pre { margin-top: .5rem; }
"""


def write_report(
  run_dir: str | os.PathLike[str],
  results: Sequence[Result],
  *,
  title: str,
  question: str,
  command: str,
  notes: Sequence[str] = (),
) -> dict[str, pathlib.Path]:
  """Writes summary.csv, the plots and report.html into the run folder.

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
    name -> path: "csv", "markdown", "html" and one per plot, e.g. "max_vio".

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
    "markdown": run_dir / "summary.md",
    "html": run_dir / "report.html",
  }
  tables.write_csv(paths["csv"], rows)
  write_markdown(paths["markdown"], rows, differences, command)
  drawn = plots.write_plots(run_dir, results, rows, load_metrics(run_dir))
  paths |= {plot.path.stem: plot.path for plot in drawn}
  body = [
    f"<h1>{escape(title)}</h1>",
    f'<p class="question">{escape(question)}</p>',
    f"<pre>{escape(command)}</pre>",
    *(f'<p class="warn">{escape(text)}</p>' for text in warnings(run_dir, results)),
    _summary(rows),
    _figures(drawn),
    _differences(differences, rows[0].arm),
    _layers(rows),
    _setup(results, load_config(run_dir)),
    _notes(notes),
  ]
  paths["html"].write_text(_page(title, "\n".join(part for part in body if part)), encoding="utf-8")
  return paths


def _page(title: str, body: str) -> str:
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
  )


def _table(header: Iterable[str], lines: Iterable[str]) -> str:
  """Header cells (with their tags) and body rows, both HTML already."""
  head, body = "".join(header), "\n".join(lines)
  return (
    f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
  )


def _head(title: str, unit: str = "", word: bool = False) -> str:
  small = f"<small>{escape(unit)}</small>" if unit else ""
  return f'<th scope="col"{" class=word" * word}>{escape(title)}{small}</th>'


def _arm(arm: str) -> str:
  """A row's header. A long name may break after the signs that join methods and options."""
  name = re.sub("([:,+=])", r"\1<wbr>", escape(arm))
  return f'<th scope="row">{name}</th>'


def _cell(text: str) -> str:
  """`a ± b` on two lines, so that all columns fit a page."""
  mean, sign, spread = text.partition(" ± ")
  return f"<td>{escape(mean)}{f'<small>± {escape(spread)}</small>' if sign else ''}</td>"


def _summary(rows: Sequence[Row]) -> str:
  columns = tables.shown_columns(rows)
  same = len({len(row.seeds) for row in rows}) == 1  # then the caption says how many
  header = [_head("Arm"), *([] if same else [_head("Seeds")]), *(_head(c.title, c.unit) for c in columns)]
  lines = []
  for row in rows:
    cells = [] if same else [str(len(row.seeds))]
    cells += [tables.format_stat(row.cells[c.key], c, len(row.seeds)) for c in columns]
    lines.append(f"<tr>{_arm(row.arm)}{''.join(map(_cell, cells))}</tr>")
  return f'<h2>Results</h2>\n{_table(header, lines)}\n<p class="note">{escape(tables.caption(rows))}</p>'


def _figures(drawn: Sequence[canvas.Plot]) -> str:
  if not drawn:
    return ""
  figures = []
  for plot in drawn:
    data = base64.b64encode(plot.path.read_bytes()).decode("ascii")
    text = escape(plot.caption)
    figures.append(
      f'<figure{" class=wide" * plot.wide}><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
    )
  return '<h2>Plots</h2>\n<div class="plots">\n' + "\n".join(figures) + "\n</div>"


def _differences(differences: Sequence[Difference], baseline: str) -> str:
  if not differences:
    return ""
  by_key = {column.key: column for column in COLUMNS}
  lines, last = [], None
  for d in differences:
    column = by_key[d.key]
    kinds = ["group"] * (d.arm != last) + ["resolved"] * d.resolved
    attributes = f' class="{" ".join(kinds)}"' if kinds else ""
    lines.append(
      f"<tr{attributes}>{_arm(d.arm if d.arm != last else '')}"
      f'<td class="word">{escape(column.title)} <small>{escape(column.unit)}</small></td>'
      f"<td>{escape(tables.format_difference(d, column))}</td><td>{len(d.per_seed)}</td>"
      f'<td class="word">{escape(d.verdict)}</td></tr>'
    )
    last = d.arm
  header = [_head("Arm"), _head("Quantity", word=True), _head("Difference"), _head("Seeds")]
  header.append(_head("Verdict", word=True))
  text = tables.differences_caption(baseline, min(len(d.per_seed) for d in differences))
  table = _table(header, lines)
  return f'<h2>Differences from {escape(baseline)}</h2>\n<p class="note">{escape(text)}</p>\n{table}'


def _layers(rows: Sequence[Row]) -> str:
  most = max(len(row.max_vio_layers) for row in rows)
  if not most:
    return ""
  column = next(c for c in COLUMNS if c.key == "max_vio_global")
  lines = []
  for row in rows:
    cells = [tables.format_stat(s, column, len(row.seeds)) for s in row.max_vio_layers]
    cells += ["-"] * (most - len(cells))
    lines.append(f"<tr>{_arm(row.arm)}{''.join(map(_cell, cells))}</tr>")
  header = [_head("Arm"), *(_head(f"Layer {i}") for i in range(most))]
  text = "MaxVio over the validation set of each layer with experts, counted from 0; ± as above."
  return f'<h2>MaxVio per layer</h2>\n{_table(header, lines)}\n<p class="note">{text}</p>'


def _setup(results: Sequence[Result], config: dict[str, Any]) -> str:
  """What the runs share, one line each; where results differ, every value."""
  names = {
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
  lines = []
  for name, path in names.items():
    values = [lookup(r, *path) for r in results]
    texts = dict.fromkeys(_plain(v) for v in values if v is not None)
    if texts:
      lines.append(f'<tr><th scope="row">{name}</th><td class="word">{escape("; ".join(texts))}</td></tr>')
  seconds = [lookup(r, "training", "seconds") for r in results]
  if all(isinstance(s, (int, float)) for s in seconds):
    time = f"{sum(seconds) / 60:.1f} minutes over all arms and seeds"
    lines.append(f'<tr><th scope="row">Training time</th><td class="word">{time}</td></tr>')
  body = "\n".join(lines)
  html = f'<h2>Setup</h2>\n<div class="scroll"><table class="facts"><tbody>\n{body}\n</tbody></table></div>'
  if config:
    text = escape(json.dumps(config.get("config", config), indent=2, default=str))
    html += f"\n<details><summary>Configuration</summary><pre>{text}</pre></details>"
  return html


def _plain(value: Any) -> str:
  if isinstance(value, dict):
    return ", ".join(f"{key} {_plain(x)}" for key, x in value.items())
  if isinstance(value, (list, tuple)):
    return ", ".join(_plain(x) for x in value)
  if isinstance(value, int) and not isinstance(value, bool):
    return f"{value:,}"
  return f"{value:.5g}" if isinstance(value, float) else str(value)


def _notes(notes: Sequence[str]) -> str:
  items = "\n".join(f"<li>{escape(note)}</li>" for note in notes)
  return f"<h2>Notes</h2>\n<ul>\n{items}\n</ul>" if notes else ""
