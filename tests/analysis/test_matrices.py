"""The matrices that are counted are those of the products that a router, or another part of a user's, computes."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import Jaxpr, jaxprs_in_params

from moe_jax.analysis.flops import forward_flops
from moe_jax.nn import Context, MoE
from moe_jax.nn.moe import group_context
from moe_jax.nn.routers import ROUTERS
from moe_jax.nn.variables import abstract
from tests import own_matrices, tiny

B, L, D, E = 4, 16, 16, 16
OF_ONE_EXPERT = ("switch_top1", "llama4_topk", "base_assignment")


def products(jaxpr: Jaxpr) -> int:
  """Operations of the products of a matrix with tokens. Choices multiply within a group, which is a batch axis."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contracted, _), (batch, _) = equation.params["dimension_numbers"]
      left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
      total += 0 if batch else 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
    total += sum(map(products, jaxprs_in_params(equation.params)))
  return total


@pytest.mark.parametrize("name", sorted(ROUTERS.builtin))
def test_operations_of_a_router_are_those_that_it_computes(name):
  k = 1 if name in OF_ONE_EXPERT else 2
  layer = abstract(lambda: MoE(D, num_experts=E, num_experts_per_token=k, router=name, rngs=nnx.Rngs(0)))
  context = Context(
    train=True,
    key_B=jax.random.split(jax.random.key(0), B),
    domain_B=jnp.zeros(B, int),
    token_id_BL=jnp.zeros((B, L), int),
  )
  bias_E = layer.balancer.bias(layer.balancer.init(layer.num_scored_experts))
  graphdef, state = nnx.split(layer.router)

  def route(state, x_GTD):
    of_groups = group_context(context, x_GTD.shape, L, bias_E)
    return nnx.merge(graphdef, state)(x_GTD, of_groups._replace(layer_input=x_GTD))

  traced = jax.make_jaxpr(route)(state, jax.ShapeDtypeStruct((B, L, D), jnp.float32))
  moe = {
    "router": name,
    "num_experts": E,
    "num_experts_per_token": k,
    "balancers": "none",
    "accept_leaks": name,
  }
  model = tiny.change(tiny.CONFIG, num_layers=1, **moe).model
  counted = forward_flops(model, tiny.VOCAB, L).router
  assert counted == products(traced.jaxpr) / (B * L)


@pytest.mark.parametrize(
  ("part", "own", "count", "operations"),
  [
    ("ffn", own_matrices.Flat, "dense", 2 * 2 * D * 32),
    ("ffn", own_matrices.Heads, "dense", 2 * 2 * D * 32),  # without the bias of two axes
    ("ffn", own_matrices.Beside, "dense", 2 * 2 * D * 32),
    ("ffn", own_matrices.Unrouted, "experts", 2 * 3 * D * 16),
    ("experts", own_matrices.HeadExperts, "experts", 2 * 2 * 2 * D * 16),
    ("router", own_matrices.Transposed, "router", 2 * D * 8),
  ],
)
def test_operations_of_own_parts_do_not_depend_on_how_matrices_are_stored(part, own, count, operations):
  model = tiny.change(tiny.CONFIG, num_layers=1, balancers="none", jitter=0.0, **{part: own}).model
  assert getattr(forward_flops(model, tiny.VOCAB, L), count) == operations
