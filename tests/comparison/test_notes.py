"""What a report says of its results: it is true of the runs that are there."""

from moe_jax.comparison import report
from moe_jax.comparison.report import words
from tests.comparison.made_results import make_result
from tests.scripts import run_scripts

NOTHING = "Nothing is dropped, so a difference in quality is not one of dropped tokens."


def of(arm, dropped, slots="capacity 0.5/2 per group of 16"):
  result = make_result(arm) | {"slots": slots}
  result["training"]["dropped_fraction"] = result["validation"]["dropped_fraction"] = dropped
  return result


def said(*results):
  return words.drops(report.summarise(results), results)


def test_what_was_dropped_is_said_of_the_results():
  one, other = of("a", [0.5, 0.75]), of("b", [0.25, 0.25])
  shares = "0.25 (b) to 0.625 (a)"
  assert said(one, other) == (
    f"Dropped of the (token, expert) assignments: {shares} in training, {shares} in validation. A difference in quality may be "
    "one of dropped tokens."
  )
  none = of("c", [0.0, 0.0], slots="dropless")
  assert said(none) == NOTHING and "0 (c) to 0.625 (a) in training" in said(one, none)
  assert "0.625 (a) in training," in said(one)
  diverged = {"arm": "d", "seed": 0, "diverged": "at step 1", "validation": {"nll": "Infinity"}}
  assert said(none, diverged) == NOTHING
  # Results of other experiments and of before do not say what bounds an expert.
  assert said(make_result("a")) == "" and said(none, make_result("b")) == "" and said(diverged) == ""


def test_the_notes_of_load_balancing_are_true_of_its_runs(tmp_path):
  small = "--preset=quick --dataset=markov --markov_states=16 --num_layers=1 --model_dim=16 --head_dim=8 "
  small += "--batch_size=8 --sequence_length=8 --eval_batches=1 --notensorboard --seeds=1 --methods=none --num_experts=4 "
  each = {
    "tour": "",
    "longer": "--num_steps=101 --dispatcher=sorted --capacity_factor=0.5 --eval_capacity_factor=1",
  }
  commands = [
    ["experiments/load_balancing.py", *small.split(), *more.split(), f"--output_dir={tmp_path / name}"]
    for name, more in each.items()
  ]
  assert [ended.status for ended in run_scripts(*commands)] == [0, 0]
  pages = {name: (tmp_path / name / "report.html").read_text().replace("<wbr>", "") for name in each}
  assert {n: ("100 steps are a tour" in page, NOTHING in page) for n, page in pages.items()} == {
    "tour": (True, True),
    "longer": (False, False),
  }
  assert "Dropped of the (token, expert) assignments: 0." in pages["longer"]
