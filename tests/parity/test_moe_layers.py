"""The whole MoE layer against the blocks of Hugging Face transformers, with the same weights."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.nn import MoE
from moe_jax.nn.ffn import MLP, GatedMLP
from tests.nn.layer import randomized
from tests.parity import oracles

B, L, D, E, K, F, Z = 2, 12, 8, 8, 3, 6, 4
X_BLD = oracles.normals(B, L, D, seed=1)


class Case(NamedTuple):
  """One layer here and there."""

  model: str
  part: str
  fields: dict  # of the configuration there
  ours: dict  # of the layer here; `shared`: how many experts wide, `activation`: of that one
  args: tuple = ()  # of the block's constructor, besides the configuration
  scale: float = 1.0  # of the input


LOCAL = {"num_local_experts": E, "intermediate_size": F}
ROUTED = {"n_routed_experts": E, "moe_intermediate_size": F}
DEEPSEEK = ROUTED | {"n_shared_experts": 2, "n_group": 4, "topk_group": 2}
BIAS = {"balancer": "loss_free_bias:0.001"}
CASES = {
  "mixtral": Case("mixtral", "SparseMoeBlock", LOCAL, {"router": "softmax_topk"}),
  "olmoe": Case(
    "olmoe",
    "SparseMoeBlock",
    {"num_experts": E, "intermediate_size": F},
    {"router": "softmax_topk:softmax=before"},
  ),
  "qwen2_moe": Case(
    "qwen2_moe",
    "SparseMoeBlock",
    {"num_experts": E, "moe_intermediate_size": F, "shared_expert_intermediate_size": 2 * F},
    {"router": "softmax_topk:softmax=before", "shared": 2},
  ),
  "deepseek_v2": Case(
    "deepseek_v2",
    "Moe",
    DEEPSEEK
    | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0, "num_attention_heads": 2},
    {"router": "device_limited_topk:groups=4:groups_per_token=2", "shared": 2},
  ),
  "deepseek_v3": Case(
    "deepseek_v3",
    "MoE",
    DEEPSEEK,
    BIAS | {"router": "node_limited_topk:groups=4:groups_per_token=2", "shared": 2},
  ),
  "deepseek_v4": Case(
    "deepseek_v4",
    "SparseMoeBlock",
    ROUTED | {"num_hidden_layers": 1, "num_hash_layers": 0},
    BIAS
    | {
      "router": "sqrt_softplus_topk:scale=1.5",
      "experts": "bounded_swiglu",
      "shared": 1,
      "activation": "bounded_swiglu",
    },
    args=(0,),
    scale=20.0,  # so that many hidden units reach the limit of 10
  ),
  "longcat_flash": Case(
    "longcat_flash",
    "MoE",
    {"n_routed_experts": E, "zero_expert_num": Z, "expert_ffn_hidden_size": F, "routed_scaling_factor": 6.0},
    {"router": f"longcat_topk:identities={Z}", "balancer": f"longcat_bias:zero_computation={Z}"},
  ),
  "llama4": Case("llama4", "Moe", LOCAL, {"router": "llama4_topk", "shared": 1}),
  "switch": Case(
    "switch_transformers",
    "SparseMLP",
    {"num_experts": E, "d_ff": F, "d_model": D, "expert_capacity": 2},
    {
      "router": "switch_top1",
      "num_experts_per_token": 1,
      "experts": "relu",
      "dispatcher": "sorted",
      "eval_capacity_factor": 2 * E / L,  # 2 slots; without capacity the block is a layer without drops
    },
  ),
}


def our_layer(case):
  """A layer with random weights and, where it has one, a random bias."""
  sizes = {"num_experts": E, "num_experts_per_token": K, "expert_dim": F}
  fields = sizes | {"dispatcher": "dropless"} | case.ours
  width, activation = F * fields.pop("shared", 0), fields.pop("activation", "swiglu")

  def build():
    rngs = nnx.Rngs(0)
    kind = GatedMLP if case.model == "qwen2_moe" else MLP
    shared = kind(D, width, activation, rngs=rngs) if width else None
    return MoE(D, shared=shared, rngs=rngs, **fields)

  columns = E + (Z if case.model == "longcat_flash" else 0)
  return randomized(build, np.random.default_rng(3).uniform(-0.3, 0.3, columns).astype(np.float32), seed=2)


def their_arrays(model, params):
  """Our parameters, or gradients, by the names that they have there: matrices are transposed."""
  w = {"/".join(path): np.asarray(leaf) for path, leaf in nnx.to_flat_state(params)}
  router, up, down = w["router/w_router_DE"], w["experts/w_up_EDF"], w["experts/w_down_EFD"]
  if model == "switch_transformers":
    arrays = {"router.classifier.weight": router.T}
    for e in range(E):
      arrays |= {f"experts.expert_{e}.wi.weight": up[e].T, f"experts.expert_{e}.wo.weight": down[e].T}
    return arrays
  gate_up_EDF = np.concatenate([w["experts/w_gate_EDF"], up], axis=-1)
  as_there = lambda w_EXY: w_EXY if model == "llama4" else w_EXY.swapaxes(1, 2)
  arrays = {
    "router.weight" if model == "llama4" else "gate.weight": router.T,
    "experts.gate_up_proj": as_there(gate_up_EDF),
    "experts.down_proj": as_there(down),
  }
  if model == "longcat_flash":
    arrays["router.classifier.weight"] = arrays.pop("gate.weight")
    # There the identity experts have first matrices, which are not used.
    arrays["experts.gate_up_proj"] = np.pad(arrays["experts.gate_up_proj"], [(0, Z), (0, 0), (0, 0)])
  if "shared/w_up_DF" in w:
    name = "shared_expert" if model in ("qwen2_moe", "llama4") else "shared_experts"
    for part, ours in (("gate", "gate_DF"), ("up", "up_DF"), ("down", "down_FD")):
      arrays[f"{name}.{part}_proj.weight"] = w[f"shared/w_{ours}"].T
  if "shared/w_shared_gate_D" in w:
    arrays["shared_expert_gate.weight"] = w["shared/w_shared_gate_D"][None]
  return arrays


def their_block(case, moe):
  sizes = {} if "d_model" in case.fields else {"hidden_size": D, "num_experts_per_tok": K}
  block = oracles.build(case.model, case.part, *case.args, **sizes, **case.fields)
  arrays = their_arrays(case.model, nnx.state(moe, nnx.Param))
  for bias_E in jax.tree.leaves(moe.balancer_state.get_value()):
    name = "router" if case.model == "longcat_flash" else "gate"
    arrays[f"{name}.e_score_correction_bias"] = np.asarray(bias_E)
  oracles.load(block, **arrays)
  return block


@pytest.mark.parametrize("name", CASES)
def test_the_same_output(name):
  case = CASES[name]
  moe = our_layer(case)
  x_BLD = case.scale * X_BLD
  y_BLD, aux = jax.jit(lambda moe, x_BLD: moe(x_BLD))(moe, x_BLD)
  expected_BLD = oracles.call(their_block(case, moe), x_BLD)
  if case.model == "llama4":  # which returns flat tokens, and the logits
    expected_BLD = expected_BLD[0].reshape(X_BLD.shape)
  np.testing.assert_allclose(y_BLD, expected_BLD, rtol=1e-4, atol=1e-5)
  dropped = B * L * moe.num_experts_per_token - aux.kept_per_expert_E.sum()
  assert (dropped > 0) == (name == "switch")


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "qwen2_moe", "llama4"])
def test_the_same_gradients(name):
  """Of the input and of every matrix, the router's included, for a random linear function of the output."""
  case = CASES[name]
  moe = our_layer(case)
  graphdef, params, rest = nnx.split(moe, nnx.Param, ...)
  c_BLD = oracles.normals(B, L, D, seed=3)

  def value(params, x_BLD):
    y_BLD, _ = nnx.merge(graphdef, params, rest)(x_BLD)
    return jnp.sum(y_BLD * c_BLD)

  d_params, d_x_BLD = jax.jit(jax.grad(value, argnums=(0, 1)))(params, X_BLD)
  block = their_block(case, moe)
  x_BLD = oracles.torch.tensor(X_BLD, requires_grad=True)
  output = block(x_BLD)
  y_BLD = output[0].reshape(x_BLD.shape) if case.model == "llama4" else output
  (y_BLD * oracles.torch.tensor(c_BLD)).sum().backward()
  np.testing.assert_allclose(d_x_BLD, x_BLD.grad.numpy(), rtol=1e-4, atol=1e-5)
  expected = {name: p.grad.numpy() for name, p in block.named_parameters()}
  found = their_arrays(case.model, d_params)
  assert found.keys() == expected.keys()
  for name, gradient in expected.items():
    assert np.abs(gradient).max() > 0.01, name
    np.testing.assert_allclose(found[name], gradient, rtol=1e-4, atol=1e-5, err_msg=name)
