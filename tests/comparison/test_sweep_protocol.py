"""What a sweep chose may differ between arms that are compared; what arms are by definition may not. Nothing is trained."""

import json

import pytest

from moe_jax import sharding
from moe_jax.comparison import sweep
from moe_jax.comparison.arms import with_arm
from moe_jax.comparison.differences import paired_differences
from moe_jax.comparison.report import words
from moe_jax.comparison.results import warnings
from moe_jax.comparison.statistics import summarise
from moe_jax.errors import InputError
from moe_jax.training.compiled import check_run
from moe_jax.training.protocol import protocol_of
from tests import tiny
from tests.comparison.made_results import make_result

CONFIG = tiny.change(tiny.CONFIG, num_layers=1, balancers="none", jitter=0.0)
ARMS = {
  "a": {},
  "b": {},
  "muon": {"optimizer": "muon"},
  "groups": {"group_size": 4},
}


def results(texts, places):
  """Results of every arm at one of its candidates, as runs write them, and what the report knows of the sweep.

  Args:
    texts: what is swept.
    places: for each arm, which of its candidates was chosen.
  """
  mesh = sharding.make_mesh(CONFIG.mesh)
  resolved = lambda arm: check_run(with_arm(CONFIG, arm), mesh)
  asked = sweep.Sweep.parse(texts, ["100", "101"])
  tried = asked.candidates({name: resolved(arm) for name, arm in ARMS.items()})
  configs = {c.name: resolved({**ARMS[arm], **c.fields}) for arm, of in tried.items() for c in of}
  found = []
  for (arm, of), place in zip(tried.items(), places, strict=True):
    protocol = protocol_of(configs[of[place].name])
    for s in range(3):
      run = make_result(of[place].name, s, perplexity=9.0 if arm == "a" else 10.0) | protocol
      found.append(run | {"training": {"tail_steps": protocol["tail_steps"]}})
  return found, json.loads(json.dumps(asked.described(tried, configs)))  # as report.json has it


def verdicts(found):
  return {d.arm.split()[0]: d.verdict for d in paired_differences(found) if d.key == "perplexity"}


def test_arms_may_differ_in_what_the_sweep_chose_and_in_nothing_else():
  found, described = results(["learning_rate:0.1,0.2", "num_steps:10,20", "batch_size:8,16"], [0, -1, 1, 2])
  own = "number of steps, tokens per step, optimizer and schedule, tail window"
  assert verdicts(found)["b"] == f"not comparable: {own}"
  marked = sweep.marked(found, described)
  assert verdicts(marked) == {
    "b": "higher (worse)",
    "muon": "not comparable: optimizer and schedule",
    "groups": "not comparable: expert capacity",
  }
  assert not any("number of steps" in text or "tail" in text for text in warnings("none", marked))
  assert any("number of steps" in text for text in warnings("none", found))


def test_a_result_of_fewer_steps_is_not_hidden_by_a_sweep_of_another_field():
  """As of an arm that an earlier, shorter command chose in the same folder."""
  found, described = results(["learning_rate:0.1,0.2"], [0, 1, 0, 0])
  earlier = [r | {"num_steps": 1} if r["arm"].startswith("b") else r for r in found]
  assert verdicts(sweep.marked(found, described))["b"] == "higher (worse)"
  assert verdicts(sweep.marked(earlier, described))["b"] == "not comparable: number of steps"


def test_batch_sizes_are_not_chosen_on_other_text():
  mesh = sharding.make_mesh(CONFIG.mesh)
  whole, part = (check_run(tiny.change(CONFIG, eval_batches=n), mesh) for n in (0, 2))
  asked = sweep.Sweep.parse(["batch_size:8,16"], ["100"])
  assert asked.candidates({"a": whole})
  with pytest.raises(InputError, match="batch_size: --eval_batches=2 would evaluate other text with each"):
    asked.candidates({"a": part})


def test_the_caption_says_what_was_chosen_and_how():
  found, described = results(["learning_rate:0.1,0.2", "num_steps:10,20"], [0, 1, 2, 3])
  said = "Each arm is at its best of learning_rate, num_steps, chosen by nll on seeds 100, 101."
  assert said in words.caption(summarise(sweep.marked(found, described)), ())
  assert "at its best" not in words.caption(summarise(found), ())


def test_the_caption_excepts_what_an_earlier_command_chose():
  """Its rows stay, and say nothing of the best value. Of what sweep.csv lacks, nothing is said."""
  found, described = results(["learning_rate:0.1,0.2"], [0, 1, 0, 0])
  line = lambda arm, value, chosen: {"arm": arm, "value": f"learning_rate={value}", "chosen": chosen}
  lines = [line("a", 0.1, "True"), line("a", 0.2, "False"), line("b", 0.1, "True"), line("b", 0.2, "False")]
  said = words.caption(summarise(sweep.marked(found, described, lines)), ())
  but = "except b learning_rate=0.2, which an earlier command chose."
  assert f"at its best of learning_rate, chosen by nll on seeds 100, 101, {but}" in said
  assert "except" not in words.caption(summarise(sweep.marked(found, described, lines[:2])), ())


def test_a_sweep_of_experts_per_token_leaves_max_vio_without_a_verdict():
  marked = sweep.marked(*results(["num_experts_per_token:1,2"], [0, 1, 0, 0]))
  found = {(d.arm.split()[0], d.key): d.verdict for d in paired_differences(marked)}
  assert found["b", "perplexity"] == "higher (worse)"
  assert found["b", "max_vio"] == "not comparable: range of MaxVio (E/K)"


def test_capacities_that_the_sweep_chose_may_differ_and_groups_may_not():
  marked = sweep.marked(*results(["capacity_factor:1,2"], [0, 1, 0, 1]))
  assert marked[0]["slots"] != marked[3]["slots"]
  assert verdicts(marked) == {
    "b": "higher (worse)",
    "muon": "not comparable: optimizer and schedule",
    "groups": "not comparable: expert capacity",
  }
