"""Means and spreads by hand, and which columns a table has."""

from moe_jax.comparison import facts, report
from moe_jax.comparison.report import tables
from tests.comparison.made_results import make_result


def test_mean_and_spread_by_hand():
  perplexities, max_vios = (10.0, 12.0, 14.0), ([1.0, 3.0], [2.0, 4.0], [0.0, 2.0])
  summary = report.summarise(
    [make_result(seed=s, perplexity=perplexities[s], max_vio=max_vios[s]) for s in range(3)]
  )
  (row,) = summary.rows
  assert row.seeds == (0, 1, 2)
  assert row.cells["perplexity"] == report.Stat(12.0, 2.0, 3)
  # Layers first: 2, 3 and 1, whose deviation is 1. Over all six values it would be 1.41.
  assert row.cells["max_vio"] == report.Stat(2.0, 1.0, 3)
  assert [s.mean for s in row.max_vio_layers] == [1.0, 3.0] and row.max_vio_range == (1.0, 3.0)
  assert row.cells["dead_experts"].mean == 0.5
  assert row.cells["excess_nll"] is None


def test_excess_prefers_the_measured_floor():
  result = make_result() | {"entropy_rate": 1.5}
  assert report.summarise([result]).rows[0].cells["excess_nll"].mean == 0.5
  assert report.summarise([result | {"validation_floor": 1.75}]).rows[0].cells["excess_nll"].mean == 0.25


def test_one_seed_has_no_spread_and_missing_keys_are_dashes():
  (row,) = report.summarise(
    [{"arm": "a", "seed": 3, "validation": {"nll": 1.0, "max_vio": [1.0, None]}}]
  ).rows
  assert row.cells["nll"] == report.Stat(1.0, None, 1)
  assert row.cells["tokens_per_second"] is None and "max_vio" not in row.cells
  column = report.columns_of([])[0]
  assert tables.format_stat(None, column, 1) == "-"
  assert tables.format_stat(report.Stat(1.0, 0.5, 2), column, 3) == "1.000 ± 0.500 (n=2)"


def test_bits_per_byte_come_first_and_are_judged_where_every_result_has_them():
  old, new = make_result("a"), make_result("b", bits_per_byte=2.0)
  keys = lambda results, judged: [c.key for c in report.columns_of(results) if c.judged >= judged]
  rest = ["max_vio", "mutual_information"]
  assert keys([old], True) == ["perplexity", *rest] and keys([old], False)[0] == "perplexity"
  assert keys([new], True) == ["bits_per_byte", *rest]
  assert keys([new], False)[:2] == ["bits_per_byte", "perplexity"]
  assert keys([old | {"domains": ["one"]}], True) == ["perplexity", "max_vio"]
  assert keys([old, new], True) == ["perplexity", *rest] and keys([old, new], False)[0] == "bits_per_byte"


def test_a_quantity_of_an_experiment_is_judged_if_it_says_so_and_dense_models_may_have_it():
  own = {"key": "gain", "title": "Gain", "unit": "nats", "format": ".4f", "lower_is_better": False}
  own |= {"part": "validation", "name": "gain", "of_experts": False, "judged": True}
  dense = {"model": {"num_experts": []}}
  results = [make_result(arm, gain=value) for arm, value in (("dense", 1.5), ("sparse", 2.0))]
  for result in results:
    result["columns"] = [*result["columns"], own]
  results[0] |= dense
  summary = report.summarise(results)
  assert [row.cells["gain"].mean for row in summary.rows] == [1.5, 2.0]
  assert summary.rows[0].cells["max_vio"] is None
  judged = [c.key for c in summary.columns if c.judged]
  assert judged == ["perplexity", "max_vio", "mutual_information", "gain"]
  del own["judged"], own["of_experts"]
  column = next(c for c in report.columns_of(results) if c.key == "gain")
  assert not column.judged and column.value(results[0]) is None


def test_the_caption_says_what_was_run():
  model = {
    "num_layers": 4,
    "model_dim": 64,
    "num_experts": [8, 16],
    "num_experts_per_token": [2],
    "expert_dim": [64],
  }
  new = {"bytes_per_token": 2.5, "cpu_cores": 2, "num_steps": 1500, "tokens_per_step": 2048, "model": model}
  results = [make_result("a", s) | new for s in range(2)] + [
    make_result("b") | new | {"num_params": 2_345_678}
  ]
  results[1]["training"] = results[1]["training"] | {"tokens_per_second": 3e4}
  found = report.summarise(results).facts
  assert (
    found["tokens"] == [1500 * 2048] and found["bytes"] == [1500 * 2048 * 2.5] and found["seeds"] == [0, 1]
  )
  assert facts.facts_sentence(found) == (
    "stdlib text; 4 layers of width 64, E = 8 to 16, K = 2, F = 64; 1,000 to 2.35M parameters (500 active); "
    "1,500 steps; 3.07M tokens (7.68M bytes); median 10,000 tokens/s on cpu x 1, 2 CPU cores. Tokens, bytes and tokens/s "
    "count padding."
  )
  assert facts.facts_sentence(report.summarise([{"arm": "a", "seed": 0}]).facts) == ""


def test_the_caption_says_how_much_of_the_tokens_is_padding():
  """Bytes are those of the text. Results of before do not know it."""
  of = lambda *parts: (
    report.summarise(
      [
        make_result("a", s) | {"bytes_per_token": 2.0, "padded_fraction": part}
        for s, part in enumerate(parts)
      ]
    ).facts
  )
  said = lambda *parts: facts.facts_sentence(of(*parts)).partition("cpu x 1. ")[2]
  assert of(0.25)["tokens"] == [30 * 64] and of(0.25)["bytes"] == [30 * 64 * 2 * 0.75]
  assert said(0.25) == "Tokens and tokens/s count padding, 25% of them."
  assert said(0.0026, 0.25) == "Tokens and tokens/s count padding, 0.26% to 25% of them."
  assert said(0.0, 0.0) == "" and facts.facts_sentence(of(0.0)).endswith("on cpu x 1.")
  assert said(0.25, None) == said(None) == "Tokens, bytes and tokens/s count padding."
  assert of(None)["bytes"] == [30 * 64 * 2]


def test_yardsticks_are_those_of_the_results():
  yardsticks = {"unigram": 4.5, "trigram": 2.5}
  assert (
    report.summarise([make_result(), make_result("b") | {"yardsticks": yardsticks}]).yardsticks == yardsticks
  )
  assert report.summarise([make_result()]).yardsticks == {}


def test_a_dense_model_has_no_balance():
  dense = [make_result("dense", seed) | {"model": {"num_experts": [1]}} for seed in range(2)]
  rows = report.summarise([make_result(seed=0), make_result(seed=1), *dense]).rows
  assert [row.cells["max_vio"] is None for row in rows] == [False, True]
  assert rows[1].cells["perplexity"].num == 2
