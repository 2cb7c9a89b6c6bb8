"""The report matches the results, in the terminal and as a self-contained page."""

import io
import json
import math
import re

import numpy as np
import pytest
from rich.console import Console

from moe_jax.comparison import differences, report, reporting
from moe_jax.comparison.folder import ComparisonFolder
from moe_jax.comparison.report import canvas, tables, words
from moe_jax.training.changes import lasting
from tests import tiny
from tests.comparison.made_results import LONG, Page, make_result, write, write_run


def test_a_diverged_run_is_reported(tmp_path):
  nan = math.nan
  lost = make_result("lost", 0, nll=nan, perplexity=nan, max_vio=[nan, nan], load=[[nan] * 4] * 2)
  write_run(tmp_path, [make_result(), lost])
  steps = (10, 3.0, [1.0, 1.0]), (20, "NaN", ["NaN", 1.0]), (30, "Infinity", [0.0, 0.0])
  lines = [{"step": step, "loss": loss, "max_vio": max_vio} for step, loss, max_vio in steps]
  (tmp_path / "arms/arm_1/seed_0/metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
  paths = write(tmp_path, report.load_results(tmp_path))
  assert "<td>not finite</td>" in paths["html"].read_text() and len(paths) == 10


def test_an_arm_with_a_diverged_seed_has_no_verdict_and_the_report_says_so(tmp_path):
  """As `diverged_result` writes it. The other seeds have balanced better, and are not the arm."""
  rng = np.random.default_rng(0)
  of = lambda arm, seed, x: make_result(
    arm, seed, bits_per_byte=x, nll=x, max_vio=[x + rng.normal() / 100] * 2
  )
  results = [of(arm, seed, x) for arm, x in (("none", 2.0), ("div", 1.0), ("good", 1.5)) for seed in range(5)]
  reason = (
    "div seed 1 has loss nan at step 7; there is no earlier checkpoint; a lower --learning_rate may help"
  )
  infinite = dict.fromkeys(("nll", "perplexity", "bits_per_byte"), "Infinity")
  results[6] = {"arm": "div", "seed": 1, "diverged": reason, "validation": infinite}
  for baseline in ("none", "div"):
    found = report.paired_differences(results, baseline)
    lost = [d for d in found if "div" in (d.arm, d.baseline)]
    assert {d.verdict for d in lost} == {f"{differences.DIVERGED}div seed 1"}
    assert not any(d.resolved or d.p_holm for d in lost)
  assert {
    d.verdict for d in report.paired_differences(results) if d.arm == "good" and d.key == "max_vio"
  } == {"lower (better)"}
  paths = write(write_run(tmp_path, results), results)
  said = "Diverged: div seed 1 (loss nan at step 7). Such an arm has no verdict, and its numbers are those of its other seeds."
  out = io.StringIO()
  report.print_table(report.summarise(results), Console(file=out, width=200))
  page, text = (paths[name].read_text() for name in ("html", "markdown"))
  assert [x.count(said) for x in (out.getvalue(), text, page)] == [1, 1, 1]
  assert (
    f'<p class="warn">{said}</p>' in page and '"div", 1, "loss nan at step 7"' in paths["about"].read_text()
  )
  cells = next(line for line in text.splitlines() if line.startswith("| `div` |")).split(" | ")
  assert cells[1] == "not finite" and cells[3].endswith("(n=4)") and cells[-1] == "diverged |"
  assert not re.search(r"\b(nan|inf)\b", re.sub(r"base64,[^\"]*|loss nan", "", text + page + out.getvalue()))
  assert text == report.markdown_table(report.read_stored(tmp_path))
  first = results[5:10] + results[:5]
  assert "No other arm has one either, because div is the baseline." in words.diverged(
    report.summarise(first)
  )
  (sentence,) = {
    j.sentence.partition(" have ")[2] for j in words.judgements(report.paired_differences(first))
  }
  assert sentence == "no verdict: a seed diverged (div seed 1)."


def test_the_markdown_table_says_what_is_resolved(tmp_path):
  of_a = [make_result("a", s, perplexity=8.0) for s in range(3)]
  of_b = [make_result("b", s, perplexity=9.0 + s / 100) for s in range(3)]
  write_run(tmp_path, of_a + of_b)
  text = write(tmp_path, report.load_results(tmp_path))["markdown"].read_text()
  assert text == report.markdown_table(report.read_stored(tmp_path))
  page = text.splitlines()
  assert page[0] == "`python x.py`" and page[2].startswith("| Arm | Perplexity |")
  assert page[4].startswith("| `a` | 8.000 ± 0.000 |") and page[4].endswith("| baseline |")
  assert "+1.010 [+0.985, +1.035]: higher (worse)" in page[5]
  assert len({line.count("|") for line in page[2:6]}) == 1
  unresolved = "No difference in {} is resolved (1 arm against a, 3 seeds)."
  assert page[7] == " ".join(map(unresolved.format, ("MaxVio global", "mutual information")))


def test_arms_of_other_sizes_are_named_in_one_line(tmp_path):
  sizes = {"none": 1000, "wide": 2_345_678, "near": 1099, "far": 1101, "small": 899, "unknown": None}
  found = [make_result(arm, 0) | {"num_params": n} for arm, n in sizes.items()]
  paths = write(write_run(tmp_path, found), found)
  said = "More parameters than none (1,000): wide (2.35M), far (1,101). Fewer parameters than none (1,000): small (899)."
  out = io.StringIO()
  report.print_table(report.summarise(found), Console(file=out, width=200))
  texts = [out.getvalue(), *(paths[name].read_text() for name in ("markdown", "html"))]
  assert [text.count(said) for text in texts] == [1, 1, 1]
  assert f"\n\n{said}\n\n" in report.markdown_table(report.read_stored(tmp_path), ["perplexity"])
  # Files of older code do not say how large an arm is.
  lines = [line.rpartition(",")[0] for line in paths["csv"].read_text().splitlines()]
  paths["csv"].write_text("\n".join([*lines, ""]))
  assert "parameters than" not in report.markdown_table(report.read_stored(tmp_path))


def test_what_is_not_resolved_is_a_bare_interval_and_one_sentence(tmp_path):
  means = {"a": 8.0, "b": 9.0, "c": 8.0}
  found = [
    make_result(arm, s, perplexity=mean + (s - 1) / (100 if arm == "b" else 10))
    for arm, mean in means.items()
    for s in range(3)
  ]
  said = "Differences without a verdict are not resolved."
  paths = write(write_run(tmp_path, found), found)
  texts = [paths[name].read_text() for name in ("markdown", "html")]
  assert all(text.count(said) == 1 and "no difference resolved" not in text for text in texts)
  assert "| +0.000 [+0.000, +0.000] |" in texts[0] and "]: higher (worse) |" in texts[0]
  judged = Page(texts[1]).tables[1]
  assert [line[5] for line in judged[1:]] == ["higher (worse)", ""]
  # Where every cell has a verdict, or no cell is shown, there is nothing to say.
  differences = report.paired_differences([r for r in found if r["arm"] != "c"])
  assert said not in words.differences_caption(differences)
  assert said not in report.markdown_table(report.read_stored(tmp_path), ["max_vio:verdict"])
  assert said not in report.markdown_table(report.read_stored(tmp_path), ["max_vio"])


@pytest.mark.parametrize("width", [40, 80, 200])
def test_table_fits_the_width_and_shows_the_judged_numbers(width):
  arms = ["none", "[red]markup[/red]", LONG]
  all_results = [
    make_result(arm, s, perplexity=1.23456 + i // 2) for i, arm in enumerate(arms) for s in range(3)
  ]
  out = io.StringIO()
  console = Console(file=out, width=width)
  report.print_table(report.summarise(all_results), console)
  report.print_differences(report.paired_differences(all_results), console)
  text = out.getvalue()
  assert max(map(len, text.splitlines())) <= width
  assert "\x1b" not in text and "…" not in text
  assert "1.235±0.000" in text and "[red]" in text and "NLL" not in text
  flat = " ".join(text.split())
  assert flat.count("higher (worse)") == 1 and flat.count("no difference resolved") == 0
  assert flat.count("Differences without a verdict are not resolved.") == 1
  assert "Mean ± sample standard deviation over 3 seeds" in flat


def test_table_prints_where_only_ascii_can_be(monkeypatch):
  raw = io.BytesIO()
  monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
  report.print_table(report.summarise([make_result(seed=s) for s in range(2)]))
  import sys

  sys.stdout.flush()
  assert b"7.389+/-0.000" in raw.getvalue()


def test_report_is_self_contained_and_escaped(tmp_path):
  evil = "<script>alert('x')</script>"
  all_results = [make_result(arm, seed) for arm in ("none", evil) for seed in range(3)]
  paths = write(
    write_run(tmp_path, all_results), all_results, title=evil, question=evil, command=evil, notes=[evil]
  )
  text = paths["html"].read_text()
  page = Page(text)
  assert not {"script", "link", "iframe"} & page.names
  assert re.findall(r"\b(?:src|href)\s*=\s*(.{11})", text) == ['"data:image'] * 5
  assert not re.search(r"@import|url\(|https?://", text)
  for part in ("abc123", "num_layers", "Differences from none", "Holm", "sample standard"):
    assert part in text
  assert text.count("{{") == text.count("{%") == 0


def test_the_tables_of_the_report_have_every_arm_and_number(tmp_path):
  arms = ["none", LONG, "<b>&amp;"]
  all_results = [make_result(arm, s, perplexity=5.0 + i + s) for i, arm in enumerate(arms) for s in range(3)]
  page = Page(write(tmp_path, all_results)["html"].read_text())
  results_table, judged, differences, layers, facts = page.tables
  summary = report.summarise(all_results)
  columns = tables.shown_columns(summary)
  assert results_table[0] == ["Arm", *(c.title + c.unit for c in columns)]
  for row, line in zip(summary.rows, results_table[1:], strict=True):
    shown = [tables.format_stat(row.cells[c.key], c, 3).replace(" ", "") for c in columns]
    assert line[0] == row.arm and [cell.replace(" ", "") for cell in line[1:]] == shown
  expected = report.paired_differences(all_results)
  assert [line[2] for line in differences[1:]] == [tables.format_difference(d) for d in expected]
  perplexities = [d for d in expected if d.key == "perplexity"]
  assert [(line[1], line[5]) for line in judged[1:]] == [
    (d.arm, d.verdict if d.resolved else "") for d in perplexities
  ]
  assert [line[0] for line in judged[1:]] == ["Perplexity", ""]
  assert [line[0] for line in differences[1:] if line[0]] == arms[1:]
  assert [line[0] for line in layers] == ["Arm", *arms] and layers[0][1:] == ["Layer 0", "Layer 1"]
  assert ["Training steps", "30"] in facts


def test_the_mean_of_seeds_of_two_settings_is_said(tmp_path):
  start = lambda seed: {"folder": "dense", "digest": "one" if seed < 2 else "other"}
  results = [make_result("a", seed) | {"init_from": start(seed)} for seed in range(3)]
  folder = ComparisonFolder(write_run(tmp_path / "run", results))
  for found, said in ((results, True), (results[:2], False)):
    out, texts = io.StringIO(), {"title": "t", "question": "q", "commands": ["c"], "notes": []}
    reporting.write_report(folder, found, Console(file=out, width=200), **texts)
    line = "The mean of a is over seeds that are not of one setting: they differ in content of --init_from."
    assert (line in out.getvalue().splitlines()) == said


@pytest.mark.parametrize("num_arms", [1, 12])
def test_one_arm_one_seed_and_many_arms(tmp_path, num_arms):
  arms = [f"method_{i}:0.01" for i in range(num_arms - 1)] + [LONG]
  all_results = [make_result(arm, 0, num_experts=64) for arm in arms]
  paths = write(write_run(tmp_path, all_results), all_results)
  page = paths["html"].read_text()
  assert "One seed per arm" in page and len(page) < 2_000_000
  assert [line[0] for line in Page(page).tables[0]] == ["Arm", *arms]
  assert ("Differences from" in page) == (num_arms > 1)
  looks = [tuple(canvas.style(i).values()) for i in range(49)]
  assert len(set(map(str, looks))) == 49
  assert len(canvas.shorten(LONG)) == 44 and canvas.shorten(LONG).endswith("rule=sign")


def test_bare_results_without_metrics_or_config(tmp_path):
  bare = [{"arm": "a", "seed": 0}, {"arm": "b", "seed": 0, "validation": {"nll": 1.0}}]
  paths = write(tmp_path, bare, notes=[])
  assert set(paths) == {"csv", "differences", "about", "markdown", "html"}
  assert [line[:2] for line in Page(paths["html"].read_text()).tables[0][1:]] == [["a", "-"], ["b", "-"]]


@pytest.mark.parametrize(
  ("limit", "said"), [(0, "over the whole validation set."), (3, "over all evaluated tokens.")]
)
def test_caption_says_over_what_the_load_was_counted(limit, said):
  config = lasting(tiny.change(tiny.CONFIG, eval_batches=limit))  # what a run writes
  summary = report.summarise([make_result(bits_per_byte=2.0) | {"config": config}])
  caption = words.caption(summary, summary.columns)
  assert f"Global: load counted {said}" in caption
  assert ("Bits per byte: of 3 batches of the validation text." in caption) == bool(limit)
