"""The whole MoE layer against the blocks of Hugging Face transformers, with the same weights."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.config import MoEConfig
from moe_jax.nn import BalancerState, MoE
from tests.parity import oracles

B, L, D, E, K, F = 2, 12, 8, 8, 3, 6
X_BLD = oracles.normals(B, L, D, seed=1)
CONFIG = MoEConfig(E, K, F, dispatcher="dropless")


class Case(NamedTuple):
  """One layer here and there."""

  model: str
  part: str
  args: tuple  # of the block's constructor, besides the configuration
  fields: dict  # of the configuration there
  config: MoEConfig  # what of CONFIG changes


def change(**fields):
  return dataclasses.replace(CONFIG, **fields)


CASES = {
  "mixtral": Case(
    "mixtral",
    "SparseMoeBlock",
    (),
    {"num_local_experts": E, "intermediate_size": F},
    change(router="softmax_topk"),
  ),
  "olmoe": Case(
    "olmoe",
    "SparseMoeBlock",
    (),
    {"num_experts": E, "intermediate_size": F},
    change(router="softmax_topk:softmax=before"),
  ),
  "qwen2_moe": Case(
    "qwen2_moe",
    "SparseMoeBlock",
    (),
    {"num_experts": E, "moe_intermediate_size": F, "shared_expert_intermediate_size": 2 * F},
    change(router="softmax_topk:softmax=before", num_shared_experts=2),
  ),
  "deepseek_v2": Case(
    "deepseek_v2",
    "Moe",
    (),
    {
      "n_routed_experts": E,
      "moe_intermediate_size": F,
      "n_shared_experts": 2,
      "topk_method": "group_limited_greedy",
      "n_group": 4,
      "topk_group": 2,
      "routed_scaling_factor": 16.0,
      "num_attention_heads": 2,
    },
    change(router="device_limited_topk:groups=4:groups_per_token=2", num_shared_experts=2),
  ),
  "deepseek_v3": Case(
    "deepseek_v3",
    "MoE",
    (),
    {"n_routed_experts": E, "moe_intermediate_size": F, "n_shared_experts": 2, "n_group": 4, "topk_group": 2},
    change(
      router="node_limited_topk:groups=4:groups_per_token=2",
      balancers="loss_free_bias:0.001",
      num_shared_experts=2,
    ),
  ),
  "deepseek_v4": Case(
    "deepseek_v4",
    "SparseMoeBlock",
    (0,),
    {
      "n_routed_experts": E,
      "moe_intermediate_size": F,
      "num_hidden_layers": 1,
      "num_hash_layers": 0,
      "swiglu_limit": 1e6,  # the limit of 10 on an expert's activations is not ours
    },
    change(router="sqrt_softplus_topk:scale=1.5", balancers="loss_free_bias:0.001", num_shared_experts=1),
  ),
  "switch": Case(
    "switch_transformers",
    "SparseMLP",
    (),
    {"num_experts": E, "d_ff": F, "d_model": D, "expert_capacity": 2},
    change(
      router="switch_top1",
      num_experts_per_token=1,
      expert_activation="relu",
      dispatcher="sorted",
      eval_capacity_factor=2 * E / L,  # 2 slots; without capacity the block is a layer without drops
    ),
  ),
}


def our_layer(config):
  """A layer with random weights and, where it has one, a random bias, made without compiling."""
  graphdef, params, balancer = nnx.split(
    nnx.eval_shape(lambda: MoE(config, D, rngs=nnx.Rngs(0))), nnx.Param, BalancerState
  )
  rng = np.random.default_rng(2)
  draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / leaf.shape[-2] ** 0.5, jnp.float32)
  bias = lambda leaf: jnp.asarray(rng.uniform(-0.3, 0.3, leaf.shape), jnp.float32)
  return graphdef, jax.tree.map(draw, params), jax.tree.map(bias, balancer)


def their_arrays(model, params):
  """Our parameters, or gradients, by the names that they have there: matrices are transposed."""
  w = {name: np.asarray(leaf) for name, leaf in nnx.to_flat_state(params)}
  router, up, down = (w[name,] for name in ("w_router_DE", "w_up_EDF", "w_down_EFD"))
  if model == "switch_transformers":
    arrays = {"router.classifier.weight": router.T}
    for e in range(E):
      arrays |= {f"experts.expert_{e}.wi.weight": up[e].T, f"experts.expert_{e}.wo.weight": down[e].T}
    return arrays
  gate_up_EDF = np.concatenate([w["w_gate_EDF",], up], axis=-1)
  arrays = {
    "gate.weight": router.T,
    "experts.gate_up_proj": gate_up_EDF.swapaxes(1, 2),
    "experts.down_proj": down.swapaxes(1, 2),
  }
  if ("shared", "w_up_DF") in w:
    name = "shared_expert" if model == "qwen2_moe" else "shared_experts"
    arrays |= {
      f"{name}.gate_proj.weight": w["shared", "w_gate_DF"].T,
      f"{name}.up_proj.weight": w["shared", "w_up_DF"].T,
      f"{name}.down_proj.weight": w["shared", "w_down_FD"].T,
    }
  return arrays


def their_block(case, params, balancer):
  sizes = {} if "d_model" in case.fields else {"hidden_size": D, "num_experts_per_tok": K}
  block = oracles.build(case.model, case.part, *case.args, **sizes, **case.fields)
  arrays = their_arrays(case.model, params)
  if case.model == "qwen2_moe":
    # Qwen multiplies its shared expert by the sigmoid of a learned projection, which we do not have: with
    # a projection of 0 that is 1/2.
    arrays["shared_expert_gate.weight"] = np.zeros((1, D), np.float32)
    arrays["shared_expert.down_proj.weight"] = 2 * arrays["shared_expert.down_proj.weight"]
  for bias_E in jax.tree.leaves(balancer):
    arrays["gate.e_score_correction_bias"] = np.asarray(bias_E)
  oracles.load(block, **arrays)
  return block


@pytest.mark.parametrize("name", CASES)
def test_the_same_output(name):
  case = CASES[name]
  graphdef, params, balancer = our_layer(case.config)
  forward = jax.jit(lambda params, balancer, x_BLD: nnx.merge(graphdef, params, balancer)(x_BLD))
  y_BLD, aux = forward(params, balancer, X_BLD)
  expected_BLD = oracles.call(their_block(case, params, balancer), X_BLD)
  np.testing.assert_allclose(y_BLD, expected_BLD, rtol=1e-4, atol=1e-5)
  dropped = B * L * case.config.num_experts_per_token - aux.kept_per_expert_E.sum()
  assert (dropped > 0) == (name == "switch")


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_the_same_gradients(name):
  """Of the input and of every matrix, the router's included, for a random linear function of the output."""
  case = CASES[name]
  graphdef, params, balancer = our_layer(case.config)
  c_BLD = oracles.normals(B, L, D, seed=3)

  def value(params, x_BLD):
    y_BLD, _ = nnx.merge(graphdef, params, balancer)(x_BLD)
    return jnp.sum(y_BLD * c_BLD)

  d_params, d_x_BLD = jax.jit(jax.grad(value, argnums=(0, 1)))(params, X_BLD)
  block = their_block(case, params, balancer)
  x_BLD = oracles.torch.tensor(X_BLD, requires_grad=True)
  (block(x_BLD) * oracles.torch.tensor(c_BLD)).sum().backward()
  np.testing.assert_allclose(d_x_BLD, x_BLD.grad.numpy(), rtol=1e-4, atol=1e-5)
  expected = {name: p.grad.numpy() for name, p in block.named_parameters()}
  found = their_arrays(case.model, d_params)
  assert found.keys() == expected.keys()
  for name, gradient in expected.items():
    assert np.abs(gradient).max() > 0.01, name
    np.testing.assert_allclose(found[name], gradient, rtol=1e-4, atol=1e-5, err_msg=name)
