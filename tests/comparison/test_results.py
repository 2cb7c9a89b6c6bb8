"""Reading a run folder, and what is told of results that may not be comparable."""

import pytest

from moe_jax.comparison import report, results
from moe_jax.errors import InputError
from tests.comparison.made_results import make_result, write, write_run


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


def test_warnings_say_what_is_not_comparable(tmp_path):
  fair = [make_result("a", 0), make_result("b", 0)]
  assert results.warnings(write_run(tmp_path, fair), fair) == []
  unfair = [make_result("a", 0), make_result("b", 1) | {"fingerprint": "other", "num_steps": 31}]
  text = " ".join(results.warnings(tmp_path, unfair))
  assert "data fingerprint differs" in text and "30, 31" in text and "different seeds" in text
  assert "not in this report: b" in results.warnings(tmp_path, fair[:1])[0]
  capacity = [r | {"slots": slots} for r, slots in zip(fair, ("dropless", "capacity 1/2"), strict=True)]
  assert "The expert capacity differs" in results.warnings(tmp_path, capacity)[0]
  assert results.warnings(tmp_path, capacity, varies=("slots",)) == []


def test_a_report_says_of_what_varies_only_what_does():
  """What no result records may vary. An unknown key is wrong, whatever the results are."""
  found = [
    make_result(arm, 0) | {"slots": slots, "objective": "x"} for arm, slots in (("a", "1"), ("b", "2"))
  ]
  assert results.varying(found, ["objective", "slots", "schedule", "num_steps"]) == ["slots", "schedule"]
  assert results.varying(found[:1], ["slots"]) == []
  with pytest.raises(ValueError, match="'slot' is no key of the protocol"):
    results.varying(found, ["slot"])
