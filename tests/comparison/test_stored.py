"""Tables as files: full precision, back again, and into the pages of the documentation."""

import csv
import dataclasses
import math
import pathlib

import numpy as np
import pytest

from moe_jax.comparison import report
from moe_jax.comparison.report import stored
from moe_jax.comparison.tried import write_tried
from moe_jax.errors import InputError
from scripts import render_tables
from tests.comparison.made_results import LONG, make_result
from tests.scripts import assert_one_line, run_scripts

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_csv_round_trip(tmp_path):
  summary = report.summarise([make_result('odd, "name"\n', s, perplexity=7.1 + s / 3) for s in range(3)])
  report.write_csv(tmp_path / "summary.csv", summary)
  with (tmp_path / "summary.csv").open(newline="") as file:
    (line,) = csv.DictReader(file)
  assert line["arm"] == 'odd, "name"\n' and line["num_seeds"] == "3" and line["seeds"] == "0 1 2"
  cell = summary.rows[0].cells["perplexity"]
  assert (float(line["perplexity_mean"]), float(line["perplexity_std"])) == (cell.mean, cell.spread)
  assert line["excess_nll_mean"] == "" and line["excess_nll_n"] == "0"
  assert (line["max_vio_lowest_layer"], line["max_vio_highest_layer"]) == ("1.0", "3.0")


def test_differences_csv_has_every_number(tmp_path):
  of_a = [make_result("a", s, perplexity=1.0) for s in (0, 1, 2)]
  of_b = [make_result("b", s, perplexity=2.0 + s / 7) for s in (0, 1, 2)]
  all_results = [*of_a, *of_b, make_result("c", 2, perplexity=5.0)]
  store(tmp_path, all_results)
  differences = report.paired_differences(all_results)
  with (tmp_path / "differences.csv").open(newline="") as file:
    lines = list(csv.DictReader(file))
  assert [(line["arm"], line["quantity"]) for line in lines] == [(d.arm, d.key) for d in differences]
  assert {line["baseline"] for line in lines} == {"a"}
  for line, d in zip(lines, differences, strict=True):
    numbers = [line[name] for name in ("mean", "standard_error", "p_value", "p_holm", "low", "high")]
    expected = (d.mean, d.standard_error, d.p_value, d.p_holm, *(d.interval or (None, None)))
    assert numbers == ["" if x is None else str(x) for x in expected]
    per_seed = {s: float(line[f"seed_{s}"]) for s in (0, 1, 2) if line[f"seed_{s}"]}
    assert per_seed == d.per_seed and line["num_seeds"] == str(len(per_seed)) and line["verdict"] == d.verdict
    assert int(line["degrees_of_freedom"]) == len(per_seed) - 1


def store(folder, results, varies=()):
  folder.mkdir(exist_ok=True)
  about = stored.about_of(results, "python x.py", varies)
  differences = report.paired_differences(results, varies=varies)
  stored.write_stored(folder, report.Stored(report.summarise(results), differences, about))


def a_comparison(in_bytes=True):
  """Results with every kind of cell: resolved, not resolved, not comparable, too few seeds, diverged, missing."""
  rng = np.random.default_rng(3)
  found = []
  means = {"none": 2.0, "better": 1.8, "same|or": 2.0, LONG: 2.5, "wide": 1.0, "few": 2.0, "lost": math.nan}
  for arm, mean in means.items():
    for s in range(2 if arm == "few" else 5):
      bits = mean + rng.normal(0, 0.01)
      validation = {"perplexity": 2**bits, "max_vio": [rng.uniform(), rng.uniform()]}
      result = make_result(arm, s, **validation, **({"bits_per_byte": bits} if in_bytes else {}))
      result |= {
        "active_width": 256 if arm == "wide" else 128,
        "slots": f"capacity {'1' if arm == LONG else '2'}",
      }
      if in_bytes:
        result |= {"bytes_per_token": 1.7, "yardsticks": {"unigram": 4.7, "bigram": 3.5, "trigram": 2.9}}
      if arm == "better" and s == 1:
        result["validation"].pop("load_entropy")
      found.append(result)
  return found


def same(a, b):
  """Equality in which NaN equals NaN."""
  return repr(a) == repr(b)


@pytest.mark.parametrize("in_bytes", [True, False])
def test_a_table_from_files_is_the_table_from_results(tmp_path, in_bytes):
  """Also results of older code, without the newer keys."""
  results = a_comparison(in_bytes)
  store(tmp_path, results, varies=("slots",))
  found = report.read_stored(tmp_path)
  summary, differences = report.summarise(results), report.paired_differences(results, varies=("slots",))
  plain = lambda c: dataclasses.replace(c, value=None)
  assert found.summary.columns == tuple(map(plain, summary.columns))
  for own, there in zip(found.summary.rows, summary.rows, strict=True):
    assert same(own, dataclasses.replace(there, max_vio_layers=[]))
  assert (found.summary.yardsticks, found.summary.facts) == (summary.yardsticks, summary.facts)
  for own, there in zip(found.differences, differences, strict=True):
    assert same(own, dataclasses.replace(there, column=plain(there.column)))
  fresh = report.Stored(summary, differences, {"command": "python x.py", "varies": ["slots"]})
  text = report.markdown_table(found)
  assert text == report.markdown_table(fresh)
  assert ("| byte trigram |  | 2.9000 |" in text) == in_bytes and "| `same\\|or` |" in text
  assert "wide (active width)" in text and "By design, arms differ in: expert capacity" in text
  assert found.about["commit"] is None or found.about["commit"].removesuffix("-dirty").isalnum()
  assert found.about["minutes"] == round(len(results) * 8 / 60, 1)


def test_columns_of_a_table_can_be_chosen(tmp_path):
  store(tmp_path, a_comparison())
  found = report.read_stored(tmp_path)
  table = report.markdown_table(
    found, ["max_vio", "bits_per_byte:verdict", "max_vio:verdict", "bits_per_byte"]
  )
  head, _, first, better = table.splitlines()[2:6]
  assert head == "| Arm | Seeds | MaxVio global | Bits per byte: difference | Bits per byte |"
  assert first.count("|") == head.count("|") and "| baseline |" in first and "]: lower (better) |" in better
  assert (
    "No difference in MaxVio global is resolved" in table
    and "mutual information" not in table.split("Differences:")[0]
  )
  plain = report.markdown_table(found, ["perplexity"])
  assert "Differences" not in plain and "byte trigram" not in plain
  for wrong in ("perplexty", "perplexity:verdict"):
    with pytest.raises(
      InputError, match=f"columns={wrong}: the table has no such column; its columns: bits_per"
    ):
      report.markdown_table(found, [wrong])


def a_page(root, text):
  (root / "docs").mkdir()
  (root / "docs" / "page.md").write_text(text)
  return root / "docs" / "page.md"


TABLE = "# Page\n\n<!-- table one columns=max_vio -->\nold\n<!-- end -->\n\nText\n\n<!-- table one -->\n<!-- end -->\n"


def test_pages_are_rewritten_from_stored_results(tmp_path):
  store(tmp_path / "run", a_comparison())
  page = a_page(tmp_path, TABLE)
  folder = render_tables.add(tmp_path, "one", tmp_path / "run")
  assert sorted(path.name for path in folder.iterdir()) == sorted(report.FILES)
  (stale,) = render_tables.stale_pages(tmp_path).items()
  assert stale[0] == page and "old" not in stale[1] and "\n\nText\n\n" in stale[1]
  assert stale[1].count("| `better` |") == 2 and stale[1].startswith(
    "# Page\n\n<!-- table one columns=max_vio -->\n"
  )
  page.write_text(stale[1])
  assert render_tables.stale_pages(tmp_path) == {}
  summary = folder / "summary.csv"
  lines = summary.read_text().splitlines()
  summary.write_text("\n".join([*lines[:-2], ""]))
  assert list(render_tables.stale_pages(tmp_path)) == [page]


def test_a_page_says_what_a_sweep_tried(tmp_path):
  store(tmp_path / "run", a_comparison())
  page = a_page(tmp_path, "<!-- table one columns=max_vio -->\n<!-- end -->\n")
  of = lambda arm, value, nll, chosen=False, note="": {
    "arm": arm, "value": value, "seeds": "100 101" if value else "", "nll": nll, "max_vio": 0.5, "goal": "nll",
    "chosen": chosen, "note": note,
  }  # fmt: skip
  lines = [of("a", "rate=1", 2.25), of("a", "rate=2", 2.0, True, "at the end"), of("a", "rate=3", math.nan)]
  write_tried(tmp_path / "run" / "sweep.csv", [*lines, of("b", "", math.nan, True)])
  folder = render_tables.add(tmp_path, "one", tmp_path / "run")
  said = render_tables.stale_pages(tmp_path)[page]
  assert "Tried for each arm on the seeds 100, 101, and chosen by `nll`:\n" in said
  rows = ["| `a` | rate=2 | 2.0000 | 0.5000 | chosen, at the end |", "| `a` | rate=1 | 2.2500 | 0.5000 |  |"]
  assert "\n".join([*rows, "| `a` | rate=3 |  | 0.5000 |  |\n"]) in said and "`b`" not in said
  steps = {"a": 12, "c": 24}
  lines = [of(arm, "rate=1", 2.25) | {"num_steps": n} for arm, n in steps.items()]
  write_tried(tmp_path / "run" / "sweep.csv", lines)
  render_tables.add(tmp_path, "one", tmp_path / "run")
  said = render_tables.stale_pages(tmp_path)[page]
  assert "| Arm | Values | Steps | NLL | MaxVio global |  |\n|---|---|---|---|---|---|\n" in said
  assert "| `c` | rate=1 | 24 | 2.2500 | 0.5000 |  |\n" in said and "| `b` | rate=1 |  | 2.2500 |" not in said
  (tmp_path / "run" / "sweep.csv").unlink()  # the next results are of no sweep
  render_tables.add(tmp_path, "one", tmp_path / "run")
  assert not (folder / "sweep.csv").exists() and "Tried" not in render_tables.stale_pages(tmp_path)[page]


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("<!-- table one -->\n", "page.md: table one has no line <!-- end -->"),
    ("<!-- table one -->\n<!-- table two -->\n<!-- end -->\n", "table one has no line"),
    (
      "<!-- table two -->\n<!-- end -->\n",
      "page.md: table two: .*two: has no summary.csv, differences.csv, about",
    ),
    (
      "<!-- table one columns=x -->\n<!-- end -->\n",
      "page.md: table one: columns=x: the table has no such column",
    ),
  ],
)
def test_a_page_that_cannot_be_rendered_is_an_input_error(tmp_path, text, message):
  store(tmp_path / "run", [make_result()])
  render_tables.add(tmp_path, "one", tmp_path / "run")
  (tmp_path / "docs" / "page.md").write_text(text)
  with pytest.raises(InputError, match=message):
    render_tables.stale_pages(tmp_path)


def test_wrong_input_of_the_script_is_one_line(tmp_path):
  script, wrong = (
    "scripts/render_tables.py",
    {
      ("--add=x",): "--add and --run_dir need each other",
      ("--add=a/b", f"--run_dir={tmp_path}"): "--add=a/b: use letters",
      ("--add=x", f"--run_dir={tmp_path}"): "has no summary.csv",
    },
  )
  *ended, check = run_scripts(*([script, *flags] for flags in wrong), [script, "--check"])
  for end, message in zip(ended, wrong.values(), strict=True):
    assert_one_line(end, message)
  assert check.status == 0 and check.stdout == "", check


def test_tables_in_the_documentation_are_those_of_the_stored_results():
  stale = render_tables.stale_pages(ROOT)
  assert not stale, f"run python scripts/render_tables.py: {[str(page) for page in stale]}"
