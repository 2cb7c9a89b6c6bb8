"""The report matches the results: statistics computed by hand, verdicts, self-contained files."""

import base64
import csv
import io
import json
import math
import re
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from moe_jax.comparison import report, results, statistics
from moe_jax.comparison.report import canvas, plots, tables
from moe_jax.errors import InputError
from moe_jax.training.results import table_columns

LONG = "switch_loss:0.01:scope=global_batch+z_loss:0.001+loss_free_bias:0.003:rule=sign"


def make_result(arm="none", seed=0, *, num_layers=2, num_experts=4, **validation):
  """A result with every key; `validation` overrides values there."""
  rng = np.random.default_rng(seed)
  load = rng.dirichlet(np.ones(num_experts), num_layers)
  by_domain = rng.dirichlet(np.ones(num_experts), (num_layers, 2))
  layers = [0.5] * num_layers
  return {
    "arm": arm, "seed": seed, "num_steps": 30, "tokens_per_step": 64, "num_params": 1000,
    "num_active_params": 500, "dataset": "stdlib", "fingerprint": "abc123", "domains": ["code", "prose"],
    "entropy_rate": None, "validation_floor": None, "columns": table_columns(),
    "validation": {
      "nll": 2.0, "perplexity": math.exp(2.0), "num_tokens": 640, "max_vio": [1.0, 3.0],
      "dropped_fraction": layers, "dead_experts": [0, 1], "load_entropy": layers, "router_entropy": layers,
      "mutual_information": layers, "load": load.tolist(), "load_by_domain": by_domain.tolist(), **validation,
    },
    "training": {
      "max_vio": layers, "dropped_fraction": layers, "router_entropy": layers, "loss": 2.0,
      "tokens_per_second": 1e4, "seconds": 6.0, "compile_seconds": 2.0, "tail_steps": 6,
    },
    "versions": {"python": "3.11.2", "jax": "0.7.0"}, "device": "cpu x 1",
  }  # fmt: skip


def write_run(folder, all_results, metrics=True):
  """The run folder that a comparison leaves, with config.json."""
  arms = list(dict.fromkeys(r["arm"] for r in all_results))
  for r in all_results:
    seed_folder = folder / "arms" / f"arm_{arms.index(r['arm'])}" / f"seed_{r['seed']}"
    seed_folder.mkdir(parents=True)
    (seed_folder / "result.json").write_text(json.dumps(r))
    if metrics:
      steps = range(10, 40, 10)
      lines = [{"step": s, "loss": 3.0 + r["seed"] - s / 20, "max_vio": [1.0, 2.0 / s]} for s in steps]
      lines.append({"step": 30, "eval_nll": 2.0})
      (seed_folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
  (folder / "config.json").write_text(json.dumps({"arms": arms, "config": {"model": {"num_layers": 2}}}))
  return folder


def write(folder, all_results, **overrides):
  words = {"title": "Title", "question": "Which?", "command": "python x.py", "notes": ["A note."]}
  return report.write_report(folder, all_results, **(words | overrides))


def differ(per_seed, key="nll"):
  """The one difference in `key` of arm b, whose seeds differ from a's by `per_seed`."""
  of_a = [make_result("a", s, nll=2.0) for s in range(len(per_seed))]
  of_b = [make_result("b", s, nll=2.0 + d) for s, d in enumerate(per_seed)]
  (difference,) = [d for d in report.paired_differences(of_a + of_b) if d.key == key]
  return difference


def test_mean_and_spread_by_hand():
  perplexities, max_vios = (10.0, 12.0, 14.0), ([1.0, 3.0], [2.0, 4.0], [0.0, 2.0])
  rows = report.summarise(
    [make_result(seed=s, perplexity=perplexities[s], max_vio=max_vios[s]) for s in range(3)]
  )
  (row,) = rows
  assert row.seeds == (0, 1, 2)
  assert row.cells["perplexity"] == report.Stat(12.0, 2.0, 3)
  # Layers first: 2, 3 and 1, whose deviation is 1. Over all six values it would be 1.41.
  assert row.cells["max_vio"] == report.Stat(2.0, 1.0, 3)
  assert [s.mean for s in row.max_vio_layers] == [1.0, 3.0] and row.max_vio_range == (1.0, 3.0)
  assert row.cells["dead_experts"].mean == 0.5
  assert row.cells["excess_nll"] is None


def test_excess_prefers_the_measured_floor():
  result = make_result() | {"entropy_rate": 1.5}
  assert report.summarise([result])[0].cells["excess_nll"].mean == 0.5
  assert report.summarise([result | {"validation_floor": 1.75}])[0].cells["excess_nll"].mean == 0.25


def test_one_seed_has_no_spread_and_missing_keys_are_dashes():
  (row,) = report.summarise([{"arm": "a", "seed": 3, "validation": {"nll": 1.0, "max_vio": [1.0, None]}}])
  assert row.cells["nll"] == report.Stat(1.0, None, 1)
  assert row.cells["tokens_per_second"] is None and "max_vio" not in row.cells
  column = report.columns_of([])[0]
  assert tables.format_stat(None, column, 1) == "-"
  assert tables.format_stat(report.Stat(1.0, 0.5, 2), column, 3) == "1.000 ± 0.500 (n=2)"


@pytest.mark.parametrize("diverged", [math.nan, "NaN", math.inf, "Infinity"])
def test_a_diverged_seed_shows_and_resolves_nothing(diverged):
  of_a = [make_result("a", s) for s in range(3)]
  of_b = [make_result("b", s, nll=1.0, perplexity=diverged if s == 1 else 2.0) for s in range(3)]
  cell = report.summarise(of_b)[0].cells["perplexity"]
  assert not math.isfinite(cell.mean)
  assert re.fullmatch(r"(nan|inf) ± nan", tables.format_stat(cell, report.columns_of([])[0], 3))
  verdicts = {d.key: d.verdict for d in report.paired_differences(of_a + of_b)}
  assert verdicts["perplexity"] == statistics.UNRESOLVED and verdicts["nll"] == "lower (better)"


def test_a_diverged_run_is_reported(tmp_path):
  nan = math.nan
  lost = make_result("lost", 0, nll=nan, perplexity=nan, max_vio=[nan, nan], load=[[nan] * 4] * 2)
  write_run(tmp_path, [make_result(), lost])
  lines = [{"step": 10, "loss": 3.0, "max_vio": [1.0, 1.0]}]
  lines += [
    {"step": 20, "loss": "NaN", "max_vio": ["NaN", 1.0]},
    {"step": 30, "loss": "Infinity", "max_vio": [0.0, 0.0]},
  ]
  (tmp_path / "arms/arm_1/seed_0/metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
  paths = write(tmp_path, report.load_results(tmp_path))
  assert "<td>nan</td>" in paths["html"].read_text() and len(paths) == 9


def test_difference_is_paired_by_seed():
  difference = differ([1.0, 1.1, 0.9])
  assert difference.mean == pytest.approx(1.0)
  assert difference.standard_error == pytest.approx(0.1 / math.sqrt(3))
  assert difference.per_seed == pytest.approx({0: 1.0, 1: 1.1, 2: 0.9})
  # Seeds that the arms do not share are no pairs.
  both = [make_result("a", s, nll=float(s)) for s in (0, 1, 2)] + [
    make_result("b", s, nll=5.0) for s in (2, 3)
  ]
  (only,) = [d for d in report.paired_differences(both) if d.key == "nll"]
  assert only.per_seed == {2: 3.0} and only.standard_error is None and not only.resolved


@pytest.mark.parametrize(
  ("per_seed", "verdict"),
  [
    ([1.0, 1.1, 0.9], "higher (worse)"),
    ([-1.0, -1.1, -0.9], "lower (better)"),
    ([1.0, -1.0, 3.0], statistics.UNRESOLVED),  # mean 1, standard error 1.15
    ([1.0, 3.0, 2.0], "higher (worse)"),  # mean 2, standard error 0.58
    ([1.0, 1.0], statistics.UNRESOLVED),  # two seeds, however equal
    ([0.0, 0.0, 0.0], statistics.UNRESOLVED),
  ],
)
def test_verdict_needs_three_seeds_and_two_standard_errors(per_seed, verdict):
  assert differ(per_seed).verdict == verdict


@pytest.mark.parametrize("per_seed", [[1.0, 1.1, 0.9], [0.3, -0.1, 0.2, 0.5, 0.0], [1.0, -2.0]])
def test_interval_and_p_value_are_those_of_the_paired_t_test(per_seed):
  difference = differ(per_seed)
  oracle = scipy.stats.ttest_rel(2.0 + np.array(per_seed), np.full(len(per_seed), 2.0))
  assert difference.degrees_of_freedom == len(per_seed) - 1
  assert difference.p_value == pytest.approx(oracle.pvalue, abs=1e-9)
  assert difference.interval == pytest.approx(tuple(oracle.confidence_interval(0.95)))


def test_t_test_at_its_ends():
  low, high = differ([1.0, 1.1, 0.9]).interval
  assert high - 1.0 == pytest.approx(1.0 - low) == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
  assert differ([0.0, 0.0, 0.0]).p_value == 1.0
  assert differ([1.0]).p_value is None and differ([1.0]).interval is None
  assert math.isnan(differ([1.0, math.nan, 1.0]).p_value)


@pytest.mark.parametrize("broken", range(4))
def test_one_seed_that_breaks_the_protocol_makes_the_difference_not_comparable(broken):
  """Whichever of the seeds it is, also one that lacks the quantity."""
  of_a, of_b = ([make_result(arm, s, nll=nll) for s in range(4)] for arm, nll in (("a", 1.0), ("b", 2.0)))
  verdict = lambda: {d.key: d for d in report.paired_differences(of_a + of_b)}["nll"]
  assert verdict().resolved
  of_b[broken]["num_steps"] += 1
  for _ in range(2):
    assert verdict().verdict == "not comparable: number of steps" and not verdict().resolved
    of_b[broken]["validation"].pop("nll", None)


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"num_steps": 200}, "number of steps"),
    ({"tokens_per_step": 1, "fingerprint": "other"}, "tokens per step, data fingerprint"),
    ({"schedule": {"learning_rate": 1.0}}, "optimizer and schedule"),
    ({"training": {"tail_steps": 7}}, "tail window"),
  ],
)
def test_runs_that_break_the_protocol_have_no_verdict(fields, words):
  shared = {"schedule": {"learning_rate": 0.5}, "num_steps": 100, "tokens_per_step": 8, "fingerprint": "one"}
  of_a = [make_result("a", s, nll=1.0) | shared for s in range(3)]
  of_b = [make_result("b", s, nll=2.0) | shared for s in range(3)]
  for result in of_a:
    result["training"] = {**result.get("training", {}), "tail_steps": 6}
  for result in of_b:
    result["training"] = {**result.get("training", {}), "tail_steps": 6} | fields.get("training", {})
    result |= {name: value for name, value in fields.items() if name != "training"}
  (difference,) = [d for d in report.paired_differences(of_a + of_b) if d.key == "nll"]
  assert difference.verdict == f"not comparable: {words}" and not difference.resolved


def test_the_markdown_table_says_what_is_resolved(tmp_path):
  of_a = [make_result("a", s, perplexity=8.0) for s in range(3)]
  of_b = [make_result("b", s, perplexity=9.0 + s / 100) for s in range(3)]
  write_run(tmp_path, of_a + of_b)
  page = write(tmp_path, report.load_results(tmp_path))["markdown"].read_text().splitlines()
  assert page[0] == "`python x.py`" and page[2].startswith("| arm | Perplexity |")
  assert page[4].startswith("| `a` | 8.000 ± 0.000 |") and page[4].endswith("| baseline |")
  assert "+1.010 ± 0.006: higher (worse)" in page[5] and "+0.000 ± 0.000: no difference resolved" in page[5]
  assert len({line.count("|") for line in page[2:]}) == 1


def test_speed_has_no_verdict():
  of_a, of_b = ([make_result(arm, s) for s in range(3)] for arm in "ab")
  for result in of_b:
    result["training"] = result["training"] | {"tokens_per_second": 1.0}
  verdicts = {d.key: d.verdict for d in report.paired_differences(of_a + of_b)}
  assert verdicts["tokens_per_second"] == "not judged"


def test_verdict_knows_which_direction_is_good():
  def verdict(key, **values):
    of_a = [make_result("a", s) for s in range(3)]
    of_b = [make_result("b", s, **values) for s in range(3)]
    return {d.key: d.verdict for d in report.paired_differences(of_a + of_b)}[key]

  assert verdict("load_entropy", load_entropy=[0.9, 0.9]) == "higher (better)"
  assert verdict("mutual_information", mutual_information=[0.9, 0.9]) == "higher"


def test_baseline_is_the_first_arm_or_the_named_one():
  both = [make_result("a", 0, nll=1.0), make_result("b", 0, nll=3.0)]
  assert [(d.arm, d.mean) for d in report.paired_differences(both) if d.key == "nll"] == [("b", 2.0)]
  assert [(d.arm, d.mean) for d in report.paired_differences(both, "b") if d.key == "nll"] == [("a", -2.0)]
  with pytest.raises(ValueError, match="'c' is not an arm"):
    report.paired_differences(both, "c")


def test_chance_of_verdict_is_students_t():
  assert statistics.chance_of_verdict(2) == pytest.approx(1 - 2 / math.pi * math.atan(2), abs=1e-6)
  assert statistics.chance_of_verdict(3) == pytest.approx(1 - 2 / math.sqrt(6), abs=1e-6)
  assert statistics.chance_of_verdict(10_000) == pytest.approx(math.erfc(math.sqrt(2)), abs=1e-4)


def test_load_results_orders_and_skips_unfinished(tmp_path):
  all_results = [make_result(arm, seed) for arm in ("none", "b", "a") for seed in (0, 1)]
  write_run(tmp_path, all_results[::-1])  # config.json then says a, b, none
  (tmp_path / "arms" / "arm_0" / "seed_7").mkdir()
  (tmp_path / "arms" / "arm_0" / "seed_8").mkdir()
  (tmp_path / "arms" / "arm_0" / "seed_8" / "result.json").write_text('{"arm": "no')
  found = report.load_results(tmp_path)
  assert [(r["arm"], r["seed"]) for r in found] == [(a, s) for a in ("a", "b", "none") for s in (0, 1)]
  assert "arm_0/seed_7, arm_0/seed_8" in results.warnings(tmp_path, found)[-1]
  (tmp_path / "config.json").unlink()
  assert [r["arm"] for r in report.load_results(tmp_path)[::2]] == ["none", "a", "b"]


def test_bad_results_are_input_errors(tmp_path):
  with pytest.raises(InputError, match="no finished arm"):
    write(tmp_path, [])
  with pytest.raises(InputError, match="two results of one seed"):
    report.summarise([make_result(), make_result()])
  write_run(tmp_path, [make_result()])
  (tmp_path / "arms" / "arm_0" / "seed_0" / "result.json").write_text("{}")
  with pytest.raises(InputError, match='keys "arm" and "seed"'):
    report.load_results(tmp_path)


def test_warnings_say_what_is_not_comparable(tmp_path):
  fair = [make_result("a", 0), make_result("b", 0)]
  assert results.warnings(write_run(tmp_path, fair), fair) == []
  unfair = [make_result("a", 0), make_result("b", 1) | {"fingerprint": "other", "num_steps": 31}]
  text = " ".join(results.warnings(tmp_path, unfair))
  assert "data fingerprint differs" in text and "30, 31" in text and "different seeds" in text
  assert "not in this report: b" in results.warnings(tmp_path, fair[:1])[0]


def test_csv_round_trip(tmp_path):
  rows = report.summarise([make_result('odd, "name"\n', s, perplexity=7.1 + s / 3) for s in range(3)])
  report.write_csv(tmp_path / "summary.csv", rows)
  with (tmp_path / "summary.csv").open(newline="") as file:
    (line,) = csv.DictReader(file)
  assert line["arm"] == 'odd, "name"\n' and line["num_seeds"] == "3"
  cell = rows[0].cells["perplexity"]
  assert (float(line["perplexity_mean"]), float(line["perplexity_std"])) == (cell.mean, cell.spread)
  assert line["excess_nll_mean"] == "" and line["excess_nll_n"] == "0"
  assert (line["max_vio_lowest_layer"], line["max_vio_highest_layer"]) == ("1.0", "3.0")


def test_differences_csv_has_what_a_correction_needs(tmp_path):
  of_a = [make_result("a", s, nll=1.0) for s in (0, 1, 2)]
  of_b = [make_result("b", s, nll=2.0 + s / 7) for s in (0, 1, 2)]
  all_results = [*of_a, *of_b, make_result("c", 2, nll=5.0)]
  path = write(tmp_path, all_results)["differences"]
  differences = report.paired_differences(all_results)
  with path.open(newline="") as file:
    lines = list(csv.DictReader(file))
  assert [(line["arm"], line["quantity"]) for line in lines] == [(d.arm, d.key) for d in differences]
  assert {line["baseline"] for line in lines} == {"a"}
  for line, d in zip(lines, differences, strict=True):
    numbers = [line[name] for name in ("mean", "standard_error", "p_value", "low", "high")]
    expected = (d.mean, d.standard_error, d.p_value, *(d.interval or (None, None)))
    assert numbers == ["" if x is None else str(x) for x in expected]
    per_seed = {s: float(line[f"seed_{s}"]) for s in (0, 1, 2) if line[f"seed_{s}"]}
    assert per_seed == d.per_seed and line["num_seeds"] == str(len(per_seed)) and line["verdict"] == d.verdict
    assert int(line["degrees_of_freedom"]) == len(per_seed) - 1


@pytest.mark.parametrize("width", [40, 80, 200])
def test_table_fits_the_width_and_shows_every_number(width):
  arms = ["none", "[red]markup[/red]", LONG]
  all_results = [make_result(arm, s, nll=1.23456 + i) for i, arm in enumerate(arms) for s in range(3)]
  out = io.StringIO()
  console = Console(file=out, width=width)
  report.print_table(report.summarise(all_results), console)
  report.print_differences(report.paired_differences(all_results), "none", console)
  text = out.getvalue()
  assert max(map(len, text.splitlines())) <= width
  assert "\x1b" not in text and "…" not in text
  assert (
    "1.2346±0.0000" in text
    and "[red]" in text
    and "Mean ± sample standard deviation over 3 seeds" in " ".join(text.split())
  )


def test_table_prints_where_only_ascii_can_be(monkeypatch):
  raw = io.BytesIO()
  monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
  report.print_table(report.summarise([make_result(seed=s) for s in range(2)]))
  import sys

  sys.stdout.flush()
  assert b"7.389+/-0.000" in raw.getvalue()


class Page(HTMLParser):
  """A page's tables and images; fails where an element is not closed in order."""

  def __init__(self, page):
    super().__init__()
    self.stack, self.names, self.tables, self.images = [], set(), [], []
    self.feed(page)
    assert not self.stack

  def handle_starttag(self, tag, attributes):
    self.names.add(tag)
    if tag not in ("meta", "img", "wbr"):
      self.stack.append(tag)
    if tag == "img":
      self.images.append(dict(attributes))
    elif tag == "table":
      self.tables.append([])
    elif tag == "tr":
      self.tables[-1].append([])
    elif tag in ("td", "th"):
      self.tables[-1][-1].append("")

  def handle_endtag(self, tag):
    assert self.stack.pop() == tag

  def handle_data(self, data):
    if {"td", "th"} & set(self.stack):
      self.tables[-1][-1][-1] += data


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
  for words in ("abc123", "num_layers", "Differences from none", "chance alone", "sample standard"):
    assert words in text
  assert text.count("{{") == text.count("{%") == 0


def test_the_tables_of_the_report_have_every_arm_and_number(tmp_path):
  arms = ["none", LONG, "<b>&amp;"]
  all_results = [make_result(arm, s, nll=1.0 + i + s) for i, arm in enumerate(arms) for s in range(3)]
  results_table, differences, layers, facts = Page(write(tmp_path, all_results)["html"].read_text()).tables
  rows = report.summarise(all_results)
  columns = tables.shown_columns(rows)
  assert results_table[0] == ["Arm", *(c.title + c.unit for c in columns)]
  for row, line in zip(rows, results_table[1:], strict=True):
    shown = [tables.format_stat(row.cells[c.key], c, 3).replace(" ", "") for c in columns]
    assert line[0] == row.arm and [cell.replace(" ", "") for cell in line[1:]] == shown
  expected = report.paired_differences(all_results)
  assert [line[4] for line in differences[1:]] == [d.verdict for d in expected]
  assert [line[0] for line in differences[1:] if line[0]] == arms[1:]
  assert [line[0] for line in layers] == ["Arm", *arms] and layers[0][1:] == ["Layer 0", "Layer 1"]
  assert ["Training steps", "30"] in facts


def test_every_picture_shows_every_arm_and_is_reproducible(tmp_path):
  all_results = [make_result(arm, seed, nll=1.0 + seed) for arm in ("none", "b") for seed in range(2)]
  for r in all_results:  # or one arm's curves would hide the other's
    r["validation"]["max_vio"] = [1.0, 2.0 + r["seed"] + 3 * (r["arm"] == "b")]
  write_run(tmp_path, all_results)
  for i, path in enumerate(sorted(tmp_path.glob("arms/*/*/metrics.jsonl"))):
    lines = [{"step": s, "loss": 3.0 - s / (9 + i), "max_vio": [1.0 + i, s / 20]} for s in (10, 20, 30)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  paths = write(tmp_path, all_results)
  names = ["max_vio", "perplexity_vs_max_vio", "loss", "load_heatmap", "domain_heatmap"]
  assert list(paths) == ["csv", "differences", "markdown", "html", *names]
  first = {name: paths[name].read_bytes() for name in names}
  images = Page(paths["html"].read_text()).images
  assert [base64.b64decode(i["src"].partition(",")[2]) for i in images] == list(first.values())
  for (name, data), attributes in zip(first.items(), images, strict=True):
    pixels = np.rint(255 * matplotlib.image.imread(io.BytesIO(data))[..., :3]).astype(int)
    height, width = pixels.shape[:2]
    assert (attributes["width"], attributes["height"]) == (str(width), str(height))
    assert 500 < width < 2000 and 250 < height < 1000
    # Colour bars, legends and the names of curves are at the right.
    seen = pixels if "perplexity" in name else pixels[:, : width // 2]
    colours, areas = np.unique(seen.reshape(-1, 3), axis=0, return_counts=True)
    if "heatmap" in name:
      assert (areas > 2000).sum() >= 6  # shades of the first arm's two rows of four experts, and paper
    else:
      for arm in range(2):
        style = canvas.style(arm)["color"]
        is_arms = (colours == [int(style[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=1)
        assert areas[is_arms].sum() > 50, (name, arm)  # letters have few pixels of any one grey
  write(tmp_path, all_results)
  assert {name: paths[name].read_bytes() for name in names} == first


@pytest.mark.parametrize("num_arms", [1, 12])
def test_one_arm_one_seed_and_many_arms(tmp_path, num_arms):
  arms = [f"method_{i}:0.01" for i in range(num_arms - 1)] + [LONG]
  all_results = [make_result(arm, 0, num_experts=64) for arm in arms]
  paths = write(write_run(tmp_path, all_results), all_results)
  page = paths["html"].read_text()
  assert "One seed per arm" in page and len(page) < 2_000_000
  assert [line[0] for line in Page(page).tables[0]] == ["Arm", *arms]
  assert ("Differences from" in page) == (num_arms > 1)
  looks = [tuple(canvas.style(i).values()) for i in range(28)]
  assert len(set(map(str, looks))) == 28
  assert len(canvas.shorten(LONG)) == 34 and canvas.shorten(LONG).endswith("rule=sign")


def test_bare_results_without_metrics_or_config(tmp_path):
  bare = [{"arm": "a", "seed": 0}, {"arm": "b", "seed": 0, "validation": {"nll": 1.0}}]
  paths = write(tmp_path, bare, notes=[])
  assert set(paths) == {"csv", "differences", "markdown", "html"}
  assert [line[:2] for line in Page(paths["html"].read_text()).tables[0][1:]] == [["a", "-"], ["b", "-"]]


def test_curves_average_layers_and_keep_shared_steps():
  metrics = {
    ("a", 0): [{"step": 1, "x": [1.0, 3.0]}, {"step": 2, "x": [2.0, 2.0]}, {"step": 3, "eval_x": 0.0}],
    ("a", 1): [{"step": 2, "x": [4.0, 4.0]}, {"step": 3, "x": [5.0, 5.0]}],
    ("b", 0): [{"step": 1, "x": 7.0}, {"step": 2, "x": None}],
  }
  curves = plots._curves(metrics, ["a", "b", "c"], "x")
  assert sorted(curves) == [0, 1]
  np.testing.assert_array_equal(curves[0][0], [2])
  np.testing.assert_array_equal(curves[0][1], [[2.0], [4.0]])
  np.testing.assert_array_equal(curves[1][1], [[7.0]])
