"""What is said of two configurations that are different runs: the leaves that differ, in short."""

import dataclasses
import json

import pytest

from moe_jax.config import BlockConfig, Config, MoEConfig, Segment
from moe_jax.training.changes import changes, differences
from tests import tiny

MOE = MoEConfig(num_experts=4, expert_dim=8)
DENSE = BlockConfig(mixer="low_rank:2", ffn="mlp")
SPARSE = BlockConfig(mixer="low_rank:2", ffn="moe", moe=MOE)


def plain(*segments):
  model = dataclasses.replace(tiny.CONFIG.model, num_layers=4, segments=segments)
  return json.loads(json.dumps(dataclasses.replace(Config(), model=model).to_dict()))


def of(block, **fields):
  return dataclasses.replace(block, **fields)


def test_what_differs_in_segments_is_named_once():
  old = plain(Segment((DENSE,)), Segment((SPARSE,), 3))
  assert changes(old, old) == []
  other = [of(block, mixer="low_rank:2:alpha=32") for block in (DENSE, SPARSE)]
  new = plain(Segment((other[0],)), Segment((other[1],), 3))
  assert changes(old, new) == ["mixer was 'low_rank:2', now 'low_rank:2:alpha=32'"]
  router = of(SPARSE, moe=dataclasses.replace(MOE, router="sigmoid_topk"))
  assert changes(old, plain(Segment((DENSE,)), Segment((router,), 3))) == [
    "router was 'softmax_topk', now 'sigmoid_topk'"
  ]


def test_layers_are_compared_also_in_other_segments():
  old = plain(Segment((SPARSE,), 4))
  assert changes(old, plain(Segment((SPARSE,), 3), Segment((of(SPARSE, mixer="mla"),)))) == [
    "mixer was 'low_rank:2', now 'mla'"
  ]
  (line,) = changes(
    old, plain(Segment((SPARSE,), 2), Segment((SPARSE,), 2))
  )  # other parameters, alike in all layers
  assert line.startswith("segments was ...") and "'repeats': 4}], now ..." in line


def test_code_inside_of_a_wrapper_is_not_known_of_an_older_version():
  was, now = {"experts": "low_rank:experts=a"}, {"experts": "low_rank:experts=a [+1]"}
  assert differences(was, now) == differences(now, now) == []
  changed = ["the code of experts 'low_rank:experts=a' has changed"]
  assert differences(now, {"experts": "low_rank:experts=a [+2]"}) == changed
  assert differences({"experts": "a"}, {"experts": "a [1]"}) == ["the code of experts 'a' has changed"]


def test_blocks_of_an_older_version_have_defaults():
  new, old = plain(Segment((SPARSE,), 4)), plain(Segment((SPARSE,), 4))
  del old["model"]["segments"][0]["pattern"][0]["moe"]["jitter"]
  del old["model"]["segments"][0]["pattern"][0]["residual"]
  assert changes(old, new) == []


@pytest.mark.parametrize("other", [[], [1], "x", None, [{"pattern": [{}], "repeats": 1}]])
def test_other_segments_are_cut(other):
  segments = plain(Segment((SPARSE,), 4))["model"]["segments"]
  (line,) = differences({"segments": segments}, {"segments": other})
  assert line.startswith("segments was [{'pattern'") and len(line) < 250


def test_long_values_show_where_they_begin_to_differ():
  old, new = "a" * 500 + "b" + "c" * 500, "a" * 500 + "d" + "c" * 500
  (line,) = differences({"x": old}, {"x": new})
  was, now = line.removeprefix("x was ").split(", now ")
  assert was == f"...{'a' * 20}b{'c' * 79}..." and now == was.replace("b", "d")


def scheduled(**fields):
  return tiny.change(tiny.CONFIG, **{"schedule": "constant", "warmup_steps": 20, **fields}).to_dict()


@pytest.mark.parametrize("fields", [{"warmup_steps": 2}, {"warmup_steps": 0}])
def test_a_constant_schedule_whose_warm_up_stays_can_be_extended(fields):
  assert changes(scheduled(num_steps=4, **fields), scheduled(num_steps=8, **fields)) == []


def test_a_warm_up_that_would_grow_with_the_steps_is_the_reason():
  (line,) = changes(scheduled(num_steps=4), scheduled(num_steps=8))
  assert line.startswith(
    "warm-up was 2 of 4 steps, now 4 of 8: --warmup_steps=20 is cut to half of the steps, "
  )
  first, second = changes(scheduled(num_steps=4), scheduled(num_steps=8, learning_rate=0.5))
  assert first == line and second.startswith("learning_rate was ")


def test_other_changes_of_the_steps_name_the_fields():
  assert changes(scheduled(num_steps=8), scheduled(num_steps=4)) == ["num_steps was 8, now 4"]
  found = changes(scheduled(num_steps=4), scheduled(num_steps=8, warmup_steps=4))
  assert sorted(found) == ["num_steps was 4, now 8", "warmup_steps was 20, now 4"]
  cosine = {"schedule": "cosine"}
  assert changes(scheduled(num_steps=4, **cosine), scheduled(num_steps=8, **cosine)) == [
    "num_steps was 4, now 8"
  ]
  found = changes(scheduled(num_steps=40, **cosine), scheduled(num_steps=80))
  assert any(line.startswith("schedule was ") for line in found)
