"""The means over the tail of training are those of a run that was neither stopped nor extended, bit by bit."""

import json

import numpy as np
import pytest

from moe_jax.training.compiled import abstract_model, resolve_config
from moe_jax.training.results import TailMeans, count_params
from tests import tiny


def tail_of(num_steps: int, fraction: float, schedule: str = "constant") -> TailMeans:
  return TailMeans(tiny.change(tiny.CONFIG, num_steps=num_steps, tail_fraction=fraction, schedule=schedule))


def steps_of(rng, num: int) -> list[dict[str, np.ndarray]]:
  draw = lambda *shape: np.asarray(rng.standard_normal(shape), np.float32)
  return [{"loss": draw(), "max_vio": draw(3), "grad_norm": draw()} for _ in range(num)]


@pytest.mark.parametrize("fraction", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("lengths", [(20, 24), (20, 33, 36), (7, 90)])
def test_an_extended_run_has_the_means_of_a_whole_one(rng, fraction, lengths):
  """Stopped once on its way to each length, too."""
  metrics = steps_of(rng, lengths[-1])
  whole = tail_of(lengths[-1], fraction)
  for step, values in enumerate(metrics, start=1):
    whole.add(step, values)
  done, saved = 0, None
  for length in lengths:
    for stop in (length - 2, length):
      tail = tail_of(length, fraction)
      if saved:
        tail.from_json(json.loads(saved))
      for step in range(done + 1, stop + 1):
        tail.add(step, metrics[step - 1])
      done, saved = stop, json.dumps(tail.to_json())
  assert (tail.count, tail.means()) == (whole.count, whole.means())
  first = lengths[-1] - whole.count  # against a mean of our own
  for name in ("loss", "max_vio"):
    expected = np.mean([np.float64(values[name]) for values in metrics[first:]], axis=0)
    np.testing.assert_allclose(whole.means()[name], expected, rtol=1e-12)


def test_other_schedules_keep_sums_only(rng):
  """They cannot be extended, and a checkpoint stays as small as it was."""
  metrics, tail = steps_of(rng, 10), tail_of(10, 1.0, "cosine")
  for step, values in enumerate(metrics, start=1):
    tail.add(step, values)
  assert tail.to_json()["values"] == {}
  again = tail_of(10, 1.0, "cosine")
  again.from_json(json.loads(json.dumps(tail.to_json())))
  assert again.means() == tail.means()


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("first", ["with", "without"])
def test_a_metric_of_a_part_of_the_tail_has_no_mean(rng, schedule, first):
  """It was registered when the run continued, or no longer was."""
  steps = steps_of(rng, 10)
  without = [{name: value for name, value in of.items() if name != "max_vio"} for of in steps]
  before, after = (steps, without) if first == "with" else (without, steps)
  tail = tail_of(10, 1.0, schedule)
  for step in range(1, 6):
    tail.add(step, before[step - 1])
  again = tail_of(10, 1.0, schedule)
  if first == "with":
    again.names.remove("max_vio")
  again.from_json(json.loads(json.dumps(tail.to_json())))
  for step in range(6, 11):
    again.add(step, after[step - 1])
  assert "max_vio" not in again.means()
  np.testing.assert_allclose(again.means()["loss"], np.mean([of["loss"] for of in steps]), rtol=1e-6)


@pytest.mark.parametrize(("router", "fields", "used"), [
  ("softmax_topk", {}, 2), ("remoe", {"balancers": "remoe_loss"}, 8), ("top_p", {"num_experts_per_token": 4}, 4),
])  # fmt: skip
def test_active_parameters_are_those_of_the_most_experts_that_a_token_may_get(router, fields, used):
  fields = {"router": router, "num_experts": 8, "dispatcher": "dropless", **fields}
  config = resolve_config(tiny.change(tiny.CONFIG, **fields))
  total, active = count_params(abstract_model(config, 16))
  moe = config.model.moe
  of_an_expert = 3 * config.model.model_dim * moe.expert_dim  # gate, up, down
  assert total - active == config.model.num_layers * (8 - used) * of_an_expert
