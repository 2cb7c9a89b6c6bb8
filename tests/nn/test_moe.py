"""The MoE layer against slow loops: output, counts, what is drawn, what is rounded, what changes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.errors import InputError
from moe_jax.nn import BalancerState, Context
from moe_jax.nn.aux import read_metrics
from moe_jax.types import Assignment, StepStats
from tests.nn.layer import BIAS_E, B, D, E, K, L, float64, forward, inputs, keys, make
from tests.reference import routing as reference
from tests.reference.moe_layer import moe_layer

MASK_BL = np.ones((B, L), bool)
MASK_BL[1, 5:] = False
MASK_BL[2] = False  # an empty sequence


def matrices(experts):
  """Gate, up and down; no gate in ReLU experts."""
  return [float64(getattr(experts, name, None)) for name in ("w_gate_EDF", "w_up_EDF", "w_down_EFD")]


def silu(x):
  return x / (1 + np.exp(-x))


def reference_entries(moe, x_BLD, mask_BL, group, router="softmax_topk"):
  """The entries of every group as numpy fields [G, A], and the softmax scores [B, L, E]."""
  logits_BLE = x_BLD.astype(np.float64) @ float64(moe.router.w_router_DE)
  route = getattr(reference, router)
  logits_GTE, mask_GT = logits_BLE.reshape(-1, group, E), mask_BL.reshape(-1, group)
  entries = [route(logits, K, BIAS_E, mask) for logits, mask in zip(logits_GTE, mask_GT, strict=True)]
  fields = [np.array([[entry[i] for entry in of_group] for of_group in entries]) for i in range(5)]
  scores_BLE = np.array([[reference.softmax(logits_E) for logits_E in row] for row in logits_BLE])
  return Assignment(*fields), scores_BLE


def reference_layer(moe, x_BLD, mask_BL, factor, group=L, router="softmax_topk"):
  """y_BLD, the entries, and which of them are kept. `factor=None`: no capacity."""
  assignment, _ = reference_entries(moe, x_BLD, mask_BL, group, router)
  weights = matrices(moe.experts)
  capacity = None if factor is None else math.ceil(group * K * factor / E)
  x_GTD = x_BLD.reshape(-1, group, D)
  weighs = "input" if router == "llama4_topk" else "output"
  y_GTD, kept_GA, _ = moe_layer(x_GTD, assignment, weights, capacity, np.zeros_like(x_GTD), weighs)
  return y_GTD.reshape(x_BLD.shape), assignment, kept_GA


@pytest.mark.parametrize(
  "dispatcher, router",
  [
    ("einsum", "softmax_topk"),
    ("sorted", "softmax_topk"),
    ("dropless", "softmax_topk"),
    ("sorted", "gshard_top2"),
    ("sorted", "llama4_topk"),
    ("dropless", "llama4_topk"),
  ],
)
def test_output_and_counts_equal_the_reference(dispatcher, router):
  moe = make(dispatcher=dispatcher, router=router)
  x_BLD = inputs()
  factor = None if dispatcher == "dropless" else 0.5
  expected, assignment, kept_GA = reference_layer(moe, x_BLD, MASK_BL, factor, router=router)
  y_BLD, aux = forward(moe, x_BLD, MASK_BL, train=True)
  np.testing.assert_allclose(y_BLD, expected, rtol=1e-5, atol=1e-5)

  # Groups are sequences here.
  count = lambda of: [np.bincount(assignment.expert_A[b][of[b]], minlength=E) for b in range(B)]
  np.testing.assert_array_equal(aux.tokens_per_expert_BE, count(assignment.valid_A))
  np.testing.assert_array_equal(aux.kept_per_expert_E, np.sum(count(kept_GA), axis=0))
  assert aux.tokens_per_expert_BE.sum() == K * MASK_BL.sum()
  # counts, and what is measured of them, are before capacity
  counts_E = np.sum(count(assignment.valid_A), axis=0)
  max_vio = read_metrics(aux)["max_vio"]
  np.testing.assert_allclose(max_vio, [counts_E.max() / counts_E.mean() - 1], rtol=1e-6)

  lost_BL = np.ones((B, L), bool)
  lost_BL[np.nonzero(kept_GA)[0], assignment.token_A[kept_GA]] = False
  assert (lost_BL & MASK_BL).any() == (dispatcher != "dropless")  # the case has tokens that are lost whole
  assert np.all(y_BLD[lost_BL] == 0)
  assert np.all(lost_BL[~MASK_BL])


@pytest.mark.parametrize("dispatcher", ["einsum", "sorted", "dropless"])
def test_weights_on_the_inputs_of_relu_experts_are_weights_on_their_outputs(dispatcher):
  """relu(w x) is w relu(x). So two routers agree, with capacity and with random bits beside the tokens."""
  fields = {"dispatcher": dispatcher, "experts": "expert_dropout:rate=0.4:experts=relu"}
  key, step_key = keys(), np.array([3, 4], np.uint32)
  on_inputs, on_outputs, undrawn = (
    forward(make(router=router, **fields), inputs(), MASK_BL, train=True, **drawn)[0]
    for router, drawn in (
      ("llama4_topk", {"key_B": key, "step_key": step_key}),
      ("sigmoid_topk", {"key_B": key, "step_key": step_key}),
      ("sigmoid_topk", {}),
    )
  )
  np.testing.assert_allclose(on_inputs, on_outputs, rtol=1e-5, atol=1e-6)
  assert np.abs(on_inputs - undrawn).max() > 0.1


def test_losses_and_entropy_equal_the_reference():
  moe = make()
  x_BLD = inputs()
  assignment, scores_BLE = reference_entries(moe, x_BLD, MASK_BL, L)
  _, aux = forward(moe, x_BLD, MASK_BL)
  entropy_BL = -(scores_BLE * np.log(scores_BLE)).sum(axis=-1)
  np.testing.assert_allclose(aux.metrics["router_entropy"][0], entropy_BL[MASK_BL].sum(), rtol=1e-5)

  counts_E = np.bincount(assignment.expert_A[assignment.valid_A], minlength=E)
  importance_E = scores_BLE[MASK_BL].mean(axis=0)
  loss = 0.5 * E * np.sum(counts_E / counts_E.sum() * importance_E)
  assert aux.metrics["router_entropy"][1] == MASK_BL.sum()
  assert list(aux.losses) == ["switch_loss"]
  np.testing.assert_allclose(aux.losses["switch_loss"], loss, rtol=1e-5)
  for observed in jax.tree.leaves(aux.balancer_stats):
    np.testing.assert_array_equal(observed, counts_E)


def test_the_loss_reads_the_statistics_of_the_step():
  moe = make(balancer="switch_loss:0.5")
  x_BLD, step_counts_E = inputs(), np.array([0, 0, 10, 0], np.float32)
  _, scores_BLE = reference_entries(moe, x_BLD, MASK_BL, L)
  _, aux = forward(moe, x_BLD, MASK_BL, step_stats=StepStats((step_counts_E,), None))
  expected = 0.5 * E * scores_BLE[MASK_BL].mean(axis=0)[2]
  np.testing.assert_allclose(aux.losses["switch_loss"], expected, rtol=1e-5)


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_shared_experts_see_every_token(activation):
  moe = make(shared=activation, experts=activation)
  x_BLD = inputs()
  routed, _, _ = reference_layer(moe, x_BLD, MASK_BL, 1.0)
  up = x_BLD @ float64(moe.shared.w_up_DF)
  if activation == "swiglu":
    hidden = silu(x_BLD @ float64(moe.shared.w_gate_DF)) * up
  else:
    assert moe.shared.w_gate_DF is None
    hidden = np.maximum(up, 0)
  y_BLD, _ = forward(moe, x_BLD, MASK_BL)
  np.testing.assert_allclose(y_BLD, routed + hidden @ float64(moe.shared.w_down_FD), rtol=1e-5, atol=1e-5)


def test_evaluation_has_its_own_capacity():
  moe = make()
  x_BLD = inputs()
  kept = {}
  for train, factor in ((True, 0.5), (False, 1.0)):
    expected, _, kept_GA = reference_layer(moe, x_BLD, MASK_BL, factor)
    y_BLD, aux = forward(moe, x_BLD, MASK_BL, train=train)
    np.testing.assert_allclose(y_BLD, expected, rtol=1e-5, atol=1e-5)
    kept[train] = aux.kept_per_expert_E.sum()
    assert kept[train] == kept_GA.sum()
  assert kept[True] < kept[False]


def test_the_router_works_in_float32():
  """Two experts whose weights bfloat16 cannot tell apart: rounded, the first would win the tie."""
  moe = make(num_experts_per_token=1, dispatcher="dropless", balancer="z_loss:1")
  moe.router.w_router_DE.set_value(np.tile(np.float32([1.0, 1.001, -1.0, -1.0]), (D, 1)))
  x_BLD = (np.abs(inputs()) + 0.5).astype(jnp.bfloat16)
  rounded_BLE = x_BLD @ moe.router.w_router_DE.get_value().astype(jnp.bfloat16)
  assert np.all(np.argmax(rounded_BLE, axis=-1) == 0)
  y_BLD, aux = forward(moe, x_BLD)
  np.testing.assert_array_equal(aux.tokens_per_expert_BE, [[0, L, 0, 0]] * B)
  assert y_BLD.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(aux)} == {np.dtype(np.float32)}

  x = np.asarray(x_BLD, np.float64)
  gate, up, down = [w[1] for w in matrices(moe.experts)]
  expected = (silu(x @ gate) * (x @ up)) @ down  # the softmax over one chosen expert is 1
  np.testing.assert_allclose(
    y_BLD.astype(np.float64), expected, rtol=0.05, atol=0.05 * np.abs(expected).max()
  )


def test_forward_mutates_nothing():
  moe = make(jitter=0.1)
  before = jax.device_get(nnx.to_pure_dict(nnx.state(moe)))
  call = lambda moe, x_BLD, key: moe(x_BLD, Context(key_B=jax.random.wrap_key_data(key), train=True))
  nnx.jit(call)(moe, inputs(), keys())  # carries changes of the layer out of the compiled program
  after = jax.device_get(nnx.to_pure_dict(nnx.state(moe)))
  assert len(jax.tree.leaves(before)) == 5  # router, gate, up, down, bias
  jax.tree.map(np.testing.assert_array_equal, before, after)


def test_balancer_state_has_no_gradient():
  moe = make(router="sigmoid_topk")
  graphdef, params, balancer = nnx.split(moe, nnx.Param, BalancerState)  # and nothing else is left
  assert all("balancer_state" not in path for path, _ in nnx.to_flat_state(params))

  def loss(params, balancer):
    y_BLD, aux = nnx.merge(graphdef, params, balancer)(inputs(), Context(MASK_BL, train=True))
    return jnp.sum(y_BLD**2) + sum(aux.losses.values())

  of_params, of_balancer = jax.device_get(jax.jit(jax.grad(loss, argnums=(0, 1)))(params, balancer))
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(of_params))
  assert [np.abs(leaf).max() for leaf in jax.tree.leaves(of_balancer)] == [0]


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"router": "softmax_top"}, "unknown router 'softmax_top': did you mean softmax_topk"),
    ({"router": "gshard_top2", "num_experts_per_token": 1}, "num_experts_per_token=1"),
    ({"balancer": "none,swich_loss:0.1"}, "unknown balancer 'swich_loss': did you mean switch_loss"),
    ({"dispatcher": "sort"}, "unknown dispatcher 'sort': did you mean sorted"),
    ({"num_experts_per_token": E + 1}, f"num_experts_per_token={E + 1}"),
    ({"router": "expert_choice", "balancer": "loss_free_bias"}, "by a bias, and the router takes none"),
    ({"router": "group_limited_topk:groups=3"}, "groups=3"),
    ({"balancer": "expert_threshold"}, "compares with no threshold; use router expert_threshold"),
    ({"balancer": "load_loss"}, "reads the smooth load"),
    ({"router": "moe_plus_plus:zeros=2", "balancer": "heterogeneous_loss"}, "has 5; say zero_computation=5"),
    (
      {"router": "longcat_topk", "balancer": "longcat_bias:zero_computation=4"},
      "has 8; say zero_computation=8",
    ),
    ({"balancer": "remoe_loss"}, "and this router chooses otherwise; use router remoe"),
    ({"router": "remoe", "balancer": "loss_free_bias"}, "and the router takes none"),
    ({"balancer": "longcat_bias:zero_computation=1"}, "no zero-computation experts; use router longcat_topk"),
  ],
)
def test_wrong_names_are_answered_at_construction(fields, words):
  with pytest.raises(InputError, match=words):
    make(**fields)


@pytest.mark.parametrize(
  "dispatcher, group_size", [("einsum", B * L), ("sorted", B * L), ("sorted", L // 2), ("dropless", L // 2)]
)
def test_the_group_size_does_not_matter_where_nothing_drops(dispatcher, group_size):
  moe = make(dispatcher=dispatcher, group_size=group_size, capacity_factor=float(E))
  x_BLD = inputs()
  expected, assignment, _ = reference_layer(moe, x_BLD, MASK_BL, None)
  y_BLD, aux = forward(moe, x_BLD, MASK_BL, train=True)
  np.testing.assert_allclose(y_BLD, expected, rtol=1e-5, atol=1e-5)
  counts_E = np.bincount(assignment.expert_A[assignment.valid_A], minlength=E)
  np.testing.assert_array_equal(aux.kept_per_expert_E, counts_E)
  np.testing.assert_array_equal(aux.tokens_per_expert_BE.sum(axis=0), counts_E)


def test_the_group_size_is_what_capacity_counts_in():
  moe = make(group_size=4)
  x_BLD = inputs()
  expected, _, _ = reference_layer(moe, x_BLD, MASK_BL, 0.5, group=4)
  y_BLD, _ = forward(moe, x_BLD, MASK_BL, train=True)
  np.testing.assert_allclose(y_BLD, expected, rtol=1e-5, atol=1e-5)


def test_flat_tokens_are_a_batch_without_sequences():
  moe = make()
  x_BLD = inputs()
  y_BLD, aux = forward(moe, x_BLD[:1])
  y_TD, flat_aux = jax.device_get(jax.jit(lambda x_TD: moe(x_TD))(x_BLD[0]))
  np.testing.assert_allclose(y_TD, y_BLD[0], rtol=1e-5, atol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), flat_aux, aux)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"balancer": "switch_loss:0.1:scope=sequence"}, "balances within each sequence"),
    ({"balancer": "loss_free_bias,sequence_loss"}, "balances within each sequence"),
    ({"router": "sequence_level"}, "decides for whole sequences"),
  ],
)
def test_flat_tokens_are_refused_where_sequences_matter(fields, message):
  with pytest.raises(InputError, match=message):
    make(**fields)(jnp.zeros((L, D)))


WITH_PARAMETERS = (
  "noisy_topk",
  "hierarchical_topk",
  "task_level",
  "cosine_topk",
  "mlp_topk",
  "gemma4_topk",
  "gpt_oss_topk",
)


@pytest.mark.parametrize("router", ["softmax_topk", "moe_plus_plus", *WITH_PARAMETERS])
def test_float32_products_are_full_precision_in_the_compiled_program(router):
  """With bfloat16 tokens those are the router's own, forward and backward. CPUs compute them so in any case."""
  moe = make(router=router, num_experts=8, balancer="none")
  x_BLD = jnp.zeros((2, L, D), jnp.bfloat16)
  context = Context(key_B=jax.random.split(jax.random.key(0), 2), domain_B=jnp.zeros(2, int), train=True)
  graphdef, state = nnx.split(moe)
  loss = lambda state: jnp.sum(nnx.merge(graphdef, state)(x_BLD, context)[0].astype(jnp.float32))
  text = jax.jit(jax.grad(loss)).lower(state).as_text()
  dots = [line for line in text.splitlines() if "dot_general" in line]
  of_router = [line for line in dots if "bf16" not in line]
  assert len(dots) > len(of_router) and (len(of_router) >= 2 or router == "task_level")
  assert all("precision = [HIGHEST, HIGHEST]" in line for line in of_router), of_router
