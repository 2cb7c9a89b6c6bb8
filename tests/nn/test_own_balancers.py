"""Wrong balancers of a user: one line that names the flag and the balancer, before anything is compiled."""

import jax.numpy as jnp
import pytest

from moe_jax import MoEConfig
from moe_jax.errors import InputError
from moe_jax.nn.build import routed_layer
from moe_jax.nn.checks import check_balancer
from moe_jax.ops.balancing import BALANCERS, Balancer
from moe_jax.ops.metrics import METRICS

E = 8
counts = lambda state, routing: routing.selected_BLE.sum((0, 1))
zeros = lambda num_experts: jnp.zeros(num_experts, jnp.int32)


@pytest.mark.parametrize("name", sorted(BALANCERS.builtin))
def test_those_of_the_package_pass(name):
  check_balancer(name, BALANCERS.resolve(name)(), 16, 2)  # longcat_bias has 8 of them without a network


def test_a_right_one_passes():
  def right():
    update = lambda state, stats: {"n": state["n"] + 1, "bias": state["bias"] + jnp.sign(stats)}
    init = lambda e: {"n": jnp.zeros((), jnp.int32), "bias": jnp.zeros(e)}
    return Balancer(init, lambda state: state["bias"], observe=counts, update=update)

  routed_layer(MoEConfig(E, 2, 8, balancers=right))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (
      {"init": zeros, "update": lambda state, stats: state + stats},
      "state from int32[8] to float32[8]; it must",
    ),
    (
      {"init": zeros, "update": lambda state, stats: state[:3]},
      "state from int32[8] to int32[3]; it must keep",
    ),
    (
      {"init": zeros, "update": lambda state, stats: (state,)},
      "state from int32[8] to (int32[8],); it must keep",
    ),
    ({"init": zeros, "bias": lambda state: jnp.zeros(3)}, "bias has shape [3]; it must be [E] with E = 8"),
    ({"losses": lambda *_: jnp.zeros(())}, "losses returns a value of type Array; it must return a dict"),
    ({"losses": lambda *_: {1: jnp.zeros(())}}, "losses returns the keys [1]; it must return a dict"),
    (
      {"losses": lambda s, r, t: {"own": r.scores_BLE.mean((0, 1))}},
      "its loss 'own' is float32[8]; it must be a",
    ),
    ({"losses": lambda *_: {"own": jnp.int32(1)}}, "its loss 'own' is int32[]; it must be a scalar"),
    ({"init": zeros, "bias": lambda state: jnp.zeros(())}, "bias has shape []; it must be [E] with E = 8"),
  ],
)
def test_a_wrong_one_is_named(fields, message):
  def bad():
    return Balancer(observe=counts, **fields)

  with pytest.raises(InputError) as error:
    routed_layer(MoEConfig(E, 2, 8, balancers=bad))
  text = str(error.value)
  assert text.startswith("--balancers=bad: balancer bad: ") and message in text and "\n" not in text


def test_a_loss_does_not_hide_another_number_of_the_logs():
  def loss():
    return Balancer()

  message = r"^--balancers=loss: balancer loss: another number in the logs has this name"
  with pytest.raises(InputError, match=message):
    routed_layer(MoEConfig(E, 2, 8, balancers=loss))


def test_nor_does_a_metric_of_ones_own_hide_a_loss_of_the_package(monkeypatch):
  routed_layer(MoEConfig(E, 2, 8, balancers="z_loss"))
  monkeypatch.setitem(METRICS, "z_loss", METRICS["max_vio"])
  with pytest.raises(InputError, match="balancer z_loss: another number in the logs has this name"):
    routed_layer(MoEConfig(E, 2, 8, balancers="z_loss"))


def test_a_factory_that_returns_no_balancer_is_named():
  def bad():
    return None

  with pytest.raises(
    InputError, match=r"^--balancers=bad: balancer bad: its factory returned NoneType; it must"
  ):
    routed_layer(MoEConfig(E, 2, 8, balancers=bad))


def test_a_wrong_scope_names_flag_and_balancer():
  message = r"^--balancers=switch_loss:scope=bufer: balancer switch_loss: scope must be one of "
  with pytest.raises(InputError, match=message):
    routed_layer(MoEConfig(E, 2, 8, balancers="switch_loss:scope=bufer"))
