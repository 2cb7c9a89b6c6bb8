"""The choices of a recorded run, found again from its trace, are those that it made."""

import json

import numpy as np
import pytest

from moe_jax.analysis.replay.choices import OwnChoices, check_choices
from moe_jax.errors import InputError
from moe_jax.training.router_trace import Trace
from tests import tiny
from tests.analysis.recorded import CONFIG, STEPS, train


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
  return train(tmp_path_factory.mktemp("biased"), router="sigmoid_topk", balancers="loss_free_bias:0.02")


@pytest.mark.parametrize(
  "fields",
  [
    {"balancers": "multiplicative_bias:0.05"},
    {"balancers": "switch_loss:0.05"},
    # draws by the run's keys, in groups of two sequences
    {
      "router": "gshard_top2",
      "balancers": "loss_free_bias:0.02",
      "accept_leaks": "gshard_top2",
      "group_size": 32,
    },
  ],
  ids=lambda fields: fields["balancers"],
)
def test_the_choices_of_each_step_are_those_of_the_run(tmp_path, fields):
  assert_chose(train(tmp_path, **fields))


def assert_chose(run):
  choices = OwnChoices(run.trace)
  for i in range(STEPS):
    steps, (selected_RBLE,) = choices.read(i, i + 1)
    np.testing.assert_array_equal(selected_RBLE.sum(axis=(1, 2)), run.tokens_per_expert_IRE[i])
    assert steps.step_I.tolist() == [i + 1] and not selected_RBLE[:, ~steps.mask_IBL[0]].any()


def test_several_recorded_steps_have_one_bias_as_a_step_has(biased):
  assert_chose(biased)
  choices = OwnChoices(biased.trace)
  _, together = choices.read(1, 3)
  apart = [choices.read(i, i + 1)[1][0] for i in (1, 2)]
  np.testing.assert_array_equal(together[0], apart[0])
  assert (together[1] != apart[1]).any()  # one update of the bias lies between them


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"router": "hash_topk", "balancers": "none"}, "--router=hash_topk: .*reads token ids"),
    (
      {"router": "moe_plus_plus", "balancers": "none"},
      "--router=moe_plus_plus: has 4 zero-computation experts",
    ),
  ],
)
def test_choices_that_a_trace_does_not_have_are_refused(fields, message):
  moe = tiny.change(CONFIG, **fields).model.moe
  scored = 12 if fields["router"] == "moe_plus_plus" else 8
  with pytest.raises(InputError, match=message) as caught:
    check_choices(moe, (2, 8, 16, scored), STEPS)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda header: header.update(every=2), "--record_router_logits=1"),
    (lambda header: header["config"]["train"].update(init_from="runs/a"), "may come from --init_from"),
  ],
)
def test_a_bias_that_does_not_follow_from_the_trace_is_refused(biased, change, message):
  trace = Trace(biased.trace.folder)
  trace.header = json.loads(json.dumps(trace.header))
  change(trace.header)
  with pytest.raises(InputError, match=f"the bias of loss_free_bias:0.02 .*{message}"):
    OwnChoices(trace)
