"""Models of one configuration are equal to `jax.jit`, and what a user's code makes is made anew."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.nn import MoE
from moe_jax.nn.variables import abstract
from moe_jax.ops.balancing import Balancer, make_balancer
from moe_jax.ops.once import made_once
from moe_jax.ops.routing import CHOICES, make_choice


def graphdef_of(**fields):
  fields = {"router": "sigmoid_topk", "balancer": "switch_loss:0.1,loss_free_bias"} | fields
  return nnx.graphdef(abstract(lambda: MoE(8, num_experts=4, expert_dim=8, rngs=nnx.Rngs(0), **fields)))


@pytest.mark.parametrize(
  "other",
  [
    {"router": "sigmoid_topk:normalize=true"},
    {"balancer": "switch_loss:0.2,loss_free_bias"},
    {"balancer": "loss_free_bias,switch_loss:0.1"},
    {"dispatcher": "sorted"},
  ],
  ids=str,
)
def test_layers_are_equal_where_their_parts_are(other):
  assert graphdef_of() == graphdef_of() and hash(graphdef_of()) == hash(graphdef_of())
  assert graphdef_of(**other) == graphdef_of(**other) != graphdef_of()


def test_a_method_that_is_defined_anew_is_made_anew():
  def define(value):
    def own(weight: float = 1.0) -> Balancer:
      return Balancer(losses=lambda state, routing, stats: {"own": value * weight})

    return own

  first, second = define(1.0), define(2.0)
  loss = lambda balancer: balancer.losses(((),), None, make_stats())["own"]
  make_stats = lambda: type("Stats", (), {"whole": ((),), "so_far": ((),)})()
  assert make_balancer(first) is not make_balancer(first)  # it may read what has changed
  assert make_balancer("switch_loss:0.1") is make_balancer("switch_loss:0.1")
  assert (loss(make_balancer(first)), loss(make_balancer(second))) == (1.0, 2.0)
  assert loss(make_balancer(functools.partial(first, weight=3.0))) == 3.0


def test_what_a_user_makes_is_made_each_time():
  makes = (lambda: object(), CHOICES.resolve(lambda num_experts, num_experts_per_token: object()))
  sizes = {"num_experts": 4, "num_experts_per_token": 2}
  for make, options in zip(makes, ({}, sizes), strict=True):
    assert made_once(make, **options) is not made_once(make, **options)
  assert make_choice("sigmoid_topk", 4, 2) is make_choice("sigmoid_topk", 4, 2)


def of_the_package(make):
  make.__module__ = "moe_jax.ops.example"
  return make


def test_arrays_of_a_function_outlive_the_program_that_asks_first():
  @of_the_package
  def make(size):
    one_X = jnp.ones(size)
    return lambda x_X: x_X + one_X

  traced = jax.jit(lambda x_X: made_once(make, 3)(x_X))
  np.testing.assert_array_equal(traced(np.zeros(3)), 1)
  np.testing.assert_array_equal(made_once(make, 3)(np.zeros(3)), 1)
  assert made_once(make, 3) is made_once(make, 3) is not made_once(make, 4)


def test_what_cannot_be_hashed_is_made_each_time():
  make = of_the_package(lambda values: lambda: sum(values))
  assert made_once(make, [1, 2])() == 3
  with pytest.raises(TypeError, match="takes one"):
    made_once(of_the_package(lambda: (_ for _ in ()).throw(TypeError("takes one"))))
