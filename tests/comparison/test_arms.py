"""The arms of the comparisons: every registered method is in an arm, and every arm can run."""

import dataclasses

import pytest

from moe_jax import sharding
from moe_jax.comparison.arms import (
  PUBLISHED,
  arms_from_flag,
  balancing,
  balancing_arm,
  granularity,
  published_notes,
  routers,
  routing_arm,
  with_arm,
)
from moe_jax.comparison.fitting import fitting_arms
from moe_jax.comparison.report import words
from moe_jax.config import Config, MeshConfig
from moe_jax.errors import InputError
from moe_jax.models import preset
from moe_jax.nn.routers import ROUTERS
from moe_jax.ops.balancing import BALANCERS
from moe_jax.registry import split_methods
from moe_jax.training.compiled import check_run
from moe_jax.training.protocol import protocol_of

CONFIG = Config(mesh=MeshConfig(data=1, expert=1))
BALANCING = balancing(CONFIG)
ROUTING = routers(CONFIG.model.moe)


def test_every_balancer_is_in_an_arm():
  named = {part.partition(":")[0] for arm in BALANCING.values() for part in split_methods(arm["balancers"])}
  assert named == BALANCERS.builtin


def test_every_router_is_in_an_arm():
  named = {arm["router"].partition(":")[0] for arm in ROUTING.values() if "router" in arm}
  named |= {"merged_topk"}  # only merging makes it
  assert named == ROUTERS.builtin


@pytest.mark.parametrize("name", [*BALANCING, *(f"router {name}" for name in ROUTING)])
def test_every_arm_can_run(name):
  arm = BALANCING.get(name) or {"balancers": "switch_loss:0.01"} | dict(ROUTING[name.removeprefix("router ")])
  check_run(with_arm(CONFIG, arm), sharding.make_mesh(CONFIG.mesh))


def test_published_weights_are_converted():
  """Switch, DeepSeek and Megatron add up layers as we do; Hugging Face has K / R of a weight in each layer."""
  assert BALANCING["switch"]["balancers"] == "switch_loss:0.01"
  for layers in (1, 4):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, num_layers=layers))
    name, weight = balancing(config)["mixtral"]["balancers"].split(":")
    assert name == "switch_loss" and float(weight) == pytest.approx(0.02 * 2 / layers, rel=1e-5)
    assert len(published_notes(["none", "olmoe"], config)) == len(PUBLISHED["olmoe"]) == 2


def test_the_report_says_which_balancers_an_arm_brings():
  arms = {name: ROUTING[name] for name in ("softmax_topk", "sigmoid_topk", "cosine_topk")}
  arms |= {"a@none": routing_arm("a@none")}
  arms = {name: {"balancers": "switch_loss:0.01"} | arm for name, arm in arms.items()}
  said = words.of_field(arms, "balancers")
  assert said == (
    "Arms have balancers=switch_loss:0.01, except that sigmoid_topk has loss_free_bias:0.001, a@none has none."
  )
  assert words.of_field({"a": {"balancers": "z_loss"}}, "balancers") == "Arms have balancers=z_loss."
  assert words.of_field({}, "balancers") == ""


def test_a_model_without_routers_has_arms_without_weights_to_convert():
  config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, ffn="mlp"))
  assert set(BALANCING) - set(balancing(config)) == set(PUBLISHED)


def test_routers_have_equal_active_width():
  moe = CONFIG.model.moe
  for name, arm in ROUTING.items():
    k, f = arm.get("num_experts_per_token", moe.num_experts_per_token), arm.get("expert_dim", moe.expert_dim)
    assert k * f == 2 * moe.expert_dim or name == "top_p"  # which sends a token to at most K experts


def test_arms_of_granularity_have_equal_active_width():
  arms, mesh = granularity(CONFIG.model.moe), sharding.make_mesh(CONFIG.mesh)
  protocols = [protocol_of(check_run(with_arm(CONFIG, arm), mesh)) for arm in arms.values()]
  assert {protocol["active_width"] for protocol in protocols} == {128}
  assert len({protocol["ffn_work"] for protocol in protocols}) == 1
  assert {arm["num_experts"] for arm in arms.values()} >= {8, 16, 32, 64, 128}
  assert next(iter(arms)) == "16x64_top2"  # the baseline is the configuration itself
  # sizes that cannot be halved or quartered have fewer arms
  odd = granularity(dataclasses.replace(CONFIG.model.moe, num_experts_per_token=1, expert_dim=6))
  assert all(arm["num_experts_per_token"] >= 1 and arm["expert_dim"] >= 1 for arm in odd.values())


def test_an_arm_has_fields_of_the_configuration_only():
  assert with_arm(CONFIG, {"learning_rate": 1.0}).optimizer.learning_rate == 1.0
  for name in ("learning_rat", "blocks"):  # `ModelConfig.blocks` is a property
    with pytest.raises(InputError, match=f"unknown field of an arm '{name}'"):
      with_arm(CONFIG, {name: 1})


def test_arms_by_name_by_spec_and_all():
  every = {"none": {"balancers": "none"}, "noisy": {"balancers": "load_loss:0.1", "router": "noisy_topk"}}
  read = lambda text: arms_from_flag("methods", text, every, balancing_arm)
  assert read("all") == every
  assert read("noisy, switch_loss:0.1@sigmoid_topk") == {
    "noisy": every["noisy"],
    "switch_loss:0.1@sigmoid_topk": {"balancers": "switch_loss:0.1", "router": "sigmoid_topk"},
  }
  assert routing_arm("sinkhorn@none") == {"router": "sinkhorn", "balancers": "none"}
  for text, message in ((" ,", "--methods=: name at least one arm"), ("none,none", "an arm is named twice")):
    with pytest.raises(InputError, match=message):
      read(text)


def test_all_leaves_out_the_arms_that_do_not_fit_and_says_which(capsys):
  """The stored tables have 16 experts, of which all can be made."""
  moe = lambda config: {n: {"balancers": "none"} | dict(arm) for n, arm in routers(config.model.moe).items()}
  for make, parse in ((balancing, balancing_arm), (moe, routing_arm)):
    read = lambda config, text="all", m=make, p=parse: fitting_arms("methods", text, m(config), p, config)
    assert read(CONFIG) == make(CONFIG) and not capsys.readouterr().err
    small = dataclasses.replace(preset("tiny"), mesh=CONFIG.mesh)
    found = read(small)
    left = make(small).keys() - found.keys()
    assert left == {"deepseek_v3" if make is balancing else "node_limited_topk:scale=1"}
    said = capsys.readouterr().err
    assert said.startswith(
      f"note: --methods=all: leaves out what cannot be made of this configuration: {left.pop()} ("
    )
    assert "group_top=2 must be between 1 and the 1 experts" in said and said.count("\n") == 1
    wrong = dataclasses.replace(small, optimizer=dataclasses.replace(small.optimizer, trained="nothing"))
    assert (
      read(wrong) == make(wrong) and not capsys.readouterr().err
    )  # the comparison then says what is wrong
  arm = balancing_arm("none@node_limited_topk")
  assert fitting_arms("methods", "none@node_limited_topk", {}, balancing_arm, small) == {
    "none@node_limited_topk": arm
  }


def test_a_router_in_place_of_a_balancer_says_how_it_is_written():
  with pytest.raises(
    InputError, match="sigmoid_topk is a router; with no balancer, it is none@sigmoid_topk:sc"
  ):
    balancing_arm("sigmoid_topk:scale=2")
  with pytest.raises(
    InputError, match="switch_loss is a balancer; behind a router, it is ROUTER@switch_loss:1"
  ):
    routing_arm("switch_loss:1")
  both = "expert_threshold"  # has this name in both registries
  assert balancing_arm(both) == {"balancers": both} and routing_arm(both) == {"router": both}
