"""Differences without a verdict: runs, seeds of an arm and arms that do not share what a fair comparison needs."""

import pytest

from moe_jax.comparison import report
from moe_jax.comparison.report import words
from moe_jax.comparison.results import warnings
from tests.comparison.made_results import make_result


@pytest.mark.parametrize("broken", range(4))
def test_one_seed_that_breaks_the_protocol_makes_the_difference_not_comparable(broken):
  """Whichever of the seeds it is, also one that lacks the quantity."""
  of_a, of_b = (
    [make_result(arm, s, perplexity=nll) for s in range(4)] for arm, nll in (("a", 1.0), ("b", 2.0))
  )
  verdict = lambda: {d.key: d for d in report.paired_differences(of_a + of_b)}["perplexity"]
  assert verdict().resolved
  of_b[broken]["num_steps"] += 1
  for _ in range(2):
    reason = "number of steps; number of steps between seeds of b"
    assert verdict().verdict == f"not comparable: {reason}" and not verdict().resolved
    of_b[broken]["validation"].pop("perplexity", None)


@pytest.mark.parametrize("uneven", ["a", "b", "ab"])
def test_seeds_of_one_arm_that_differ_in_the_protocol_are_one_setting_to_nobody(uneven):
  """A longer run of later seeds, in the same folder. Pairs are alike where both arms have it."""
  results = [make_result(arm, s, perplexity=x) for arm, x in (("a", 1.0), ("b", 2.0)) for s in range(6)]
  verdict = lambda: {d.key: d.verdict for d in report.paired_differences(results, varies=("num_steps",))}
  assert verdict()["perplexity"] == "higher (worse)"
  for result in results:
    if result["arm"] in uneven and result["seed"] > 2:
      result["num_steps"] = 60
  within = "; ".join(f"number of steps between seeds of {arm}" for arm in reversed(uneven))
  assert verdict()["perplexity"] == f"not comparable: {within}"
  # Of seeds that are in no pair, nothing is compared.
  results = [r for r in results if r["arm"] == "b" or r["seed"] < 3]
  assert verdict()["perplexity"] == "higher (worse)"


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"num_steps": 200}, "number of steps"),
    ({"tokens_per_step": 1, "fingerprint": "other"}, "tokens per step, data fingerprint"),
    (
      {"sequence_length": 4},
      "sequence length",
    ),  # with as many tokens in a step, and sequences in an evaluation
    ({"schedule": {"learning_rate": 1.0}}, "optimizer and schedule"),
    ({"training": {"tail_steps": 7}}, "tail window"),
    ({"active_width": 256}, "active width"),
    ({"active_width": 256, "ffn_work": 2}, "active width"),  # which is why the work is another
    ({"ffn_work": 2}, "feed-forward work"),
    ({"num_layers": 4, "ffn_work": 2}, "number of layers"),
    ({"model_dim": 32, "ffn_work": 2, "slots": "dropless"}, "width of the model, expert capacity"),
    ({"slots": "dropless", "inputs": "domain"}, "expert capacity, router input"),
    ({"sees_later_tokens": None}, "view of later tokens"),  # could not be measured
    ({"ffn_work": None}, "feed-forward work"),  # could not be counted
    (
      {"ffn_work": 2, "active_width": None},
      "feed-forward work",
    ),  # which is known of a user's part, and the width is not
  ],
)
def test_runs_that_break_the_protocol_have_no_verdict(fields, words):
  shared = {"schedule": {"learning_rate": 0.5}, "num_steps": 100, "tokens_per_step": 8, "fingerprint": "one"}
  shared |= {"active_width": 128, "slots": "capacity 1.25/2 per group of 64", "inputs": ""}
  shared |= {
    "ffn_work": 1,
    "num_layers": 2,
    "model_dim": 16,
    "sees_later_tokens": False,
    "sequence_length": 8,
  }
  of_a = [make_result("a", s, perplexity=1.0) | shared for s in range(3)]
  of_b = [make_result("b", s, perplexity=2.0) | shared for s in range(3)]
  for result in of_a:
    result["training"] = {**result.get("training", {}), "tail_steps": 6}
  for result in of_b:
    result["training"] = {**result.get("training", {}), "tail_steps": 6} | fields.get("training", {})
    result |= {name: value for name, value in fields.items() if name != "training"}
  (difference,) = [d for d in report.paired_differences(of_a + of_b) if d.key == "perplexity"]
  assert difference.verdict == f"not comparable: {words}" and not difference.resolved
  assert difference.broken == words and difference.p_holm is None


@pytest.mark.parametrize(
  ("start_of", "comparable"),
  [
    (lambda arm, s: {"folder": f"dense/seed_{s}", "digest": f"of {s}"}, True),
    (lambda arm, s: {"folder": f"dense/seed_{s}", "digest": f"of {arm if s == 2 else s}"}, False),
    (lambda arm, s: {"folder": "dense", "digest": "of both"}, True),
    (lambda arm, s: {"folder": "dense", "digest": f"of {s}"}, False),  # it was written anew between seeds
    (lambda arm, s: {"folder": f"{arm}/seed_{s}", "digest": f"of {arm} {s}"}, True),  # the question, or arms
    (lambda arm, s: {"folder": "dense"} | ({"digest": f"of {s}"} if arm == "b" and s == 1 else {}), True),
  ],
)
def test_arms_that_name_one_folder_to_start_from_must_have_found_the_same_parameters(
  start_of, comparable, tmp_path
):
  results = [
    make_result(arm, s, perplexity=x) | {"init_from": start_of(arm, s)}
    for arm, x in (("a", 1.0), ("b", 2.0))
    for s in range(3)
  ]
  found = {d.key: d for d in report.paired_differences(results)}["perplexity"]
  said = [
    line for line in warnings(tmp_path, results) if line.startswith("The content of --init_from differs")
  ]
  assert found.resolved == comparable and len(said) == (not comparable)
  assert comparable or found.broken.startswith("content of --init_from")


def test_a_question_that_varies_the_width_varies_the_work(tmp_path):
  of_a, of_b = (
    [make_result(arm, s, perplexity=w + 0.1) | {"active_width": w, "ffn_work": 9 * w} for s in range(3)]
    for arm, w in (("a", 16), ("b", 32))
  )
  found = report.paired_differences(of_a + of_b, varies=("active_width",))
  assert not any(difference.broken for difference in found)
  assert not any("work" in line for line in warnings(tmp_path, of_a + of_b, ("active_width",)))


def test_an_unknown_width_does_not_hide_that_the_work_differs(tmp_path):
  shared = {"active_width": 16, "ffn_work": 9}
  of_a = [make_result("a", s) | shared for s in range(3)]
  of_b = [make_result("b", s) | shared | {"active_width": None, "ffn_work": 99} for s in range(3)]
  assert "The feed-forward work differs between results: 9, 99." in warnings(tmp_path, of_a + of_b)
  old = [{name: x for name, x in result.items() if name != "ffn_work"} for result in of_b]
  assert not any(d.broken for d in report.paired_differences(of_a + old))


def test_a_key_that_one_result_does_not_record_is_no_contradiction():
  of_a = [make_result("a", s) for s in range(3)]
  of_b = [
    make_result("b", s, perplexity=9.0 + s) | {"slots": "dropless", "active_width": None} for s in range(3)
  ]
  assert not any(d.broken for d in report.paired_differences(of_a + of_b))


def test_evaluations_of_other_text_are_not_compared():
  of_a = [make_result("a", s) | {"eval_sequences": 0} for s in range(3)]
  of_b = [make_result("b", s, perplexity=9.0 + s) | {"eval_sequences": 16} for s in range(3)]
  found = report.paired_differences(of_a + of_b)
  assert {d.broken for d in found} == {"sequences of an evaluation"}


def test_arms_that_are_not_comparable_are_listed_once():
  with_slots = [
    make_result("none", s, perplexity=8.0, max_vio=[1.0]) | {"slots": "dropless"} for s in range(3)
  ]
  other = [make_result("b", s, perplexity=9.0, max_vio=[1.0]) | {"slots": "capacity 1/2"} for s in range(3)]
  found = report.paired_differences(with_slots + other)
  assert words.not_comparable(found) == "Not comparable with none, so without a verdict: b (expert capacity)."
  assert "no arm is comparable" in words.judgements(found)[0].sentence
  varied = report.paired_differences(with_slots + other, varies=("slots",))
  assert words.not_comparable(varied) == ""
  assert "By design, arms differ in: expert capacity." in words.differences_caption(varied, ("slots",))


def test_other_ranges_of_max_vio_take_only_its_verdicts():
  bounds = {"none": 4.0, "b": 4.0, "wide": 8.0, "long": 8.0, "old": None}
  results = [
    make_result(arm, s, perplexity=8.0 + 0.1 * s * (arm == "b"), max_vio=[1.0 if arm == "none" else 0.5])
    | {"max_vio_range": bound, "slots": "dropless" if arm == "long" else "capacity 1/1"}
    for arm, bound in bounds.items()
    for s in range(3)
  ]
  found = report.paired_differences(results)
  verdicts = {(d.arm, d.key): d.verdict for d in found}
  reason = "range of MaxVio (E/K)"
  assert [verdicts[arm, "max_vio"] for arm in ("b", "wide", "long", "old")] == [
    "lower (better)",
    f"not comparable: {reason}",
    f"not comparable: expert capacity, {reason}",
    "lower (better)",  # which does not record it
  ]
  assert verdicts["wide", "max_vio_training"] == f"not comparable: {reason}"
  others = ("perplexity", "mutual_information", "load_entropy")
  assert [verdicts["wide", key] for key in others] == [verdicts["b", key] for key in others]
  assert words.not_comparable(found) == (
    "Not comparable with none, so without a verdict: long (expert capacity). "
    f"Not comparable with none in MaxVio global, so without a verdict: wide ({reason})."
  )
  varied = report.paired_differences(results, varies=("max_vio_range",))
  assert {(d.arm, d.key): d.verdict for d in varied}["wide", "max_vio"] == "lower (better)"
  assert f"By design, arms differ in: {reason}." in words.differences_caption(varied, ("max_vio_range",))
