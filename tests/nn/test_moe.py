"""The MoE layer against slow loops: output, counts, what is drawn, what is rounded, what changes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.config import MoEConfig
from moe_jax.errors import InputError
from moe_jax.nn import BalancerState, MoE
from moe_jax.types import Assignment, StepStats
from tests.reference import routing as reference
from tests.reference.moe_layer import moe_layer

B, L, D, E, K, F = 3, 8, 8, 4, 2, 6
CONFIG = MoEConfig(
  num_experts=E,
  num_experts_per_token=K,
  expert_dim=F,
  balancers="switch_loss:0.5,loss_free_bias:0.1",
  capacity_factor=0.5,  # 2 of an expert's 4 fair slots
  eval_capacity_factor=1.0,
)
BIAS_E = np.array([0.4, -0.3, 0.0, 0.2], np.float32)
MASK_BL = np.ones((B, L), bool)
MASK_BL[1, 5:] = False
MASK_BL[2] = False  # an empty sequence


def change(**fields):
  return dataclasses.replace(CONFIG, **fields)


def make(config, dim=D):
  """A layer with random weights, made without compiling; a loss-free bias, if it has one, moves choices."""
  graphdefs = []

  def build():
    graphdef, *states = nnx.split(MoE(config, dim, rngs=nnx.Rngs(0)), nnx.Param, BalancerState)
    graphdefs.append(graphdef)
    return states

  params, balancer = jax.eval_shape(build)
  rng = np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / leaf.shape[-2] ** 0.5, jnp.float32)
  bias = jax.tree.map(lambda _: jnp.asarray(BIAS_E), balancer)
  return nnx.merge(graphdefs[0], jax.tree.map(draw, params), bias)


@functools.partial(jax.jit, static_argnames=("graphdef", "train"))
def _forward(graphdef, state, x_BLD, mask_BL, key_data, step_stats, train):
  key_B = None if key_data is None else jax.random.wrap_key_data(key_data)
  moe = nnx.merge(graphdef, state)
  return moe(x_BLD, mask_BL, key_B=key_B, step_stats=step_stats, train=train)


def forward(moe, x_BLD, mask_BL=None, key_data=None, step_stats=None, train=False):
  """`moe(...)`, compiled as one program; `key_data` [B, 2] holds the keys of the sequences."""
  return jax.device_get(_forward(*nnx.split(moe), x_BLD, mask_BL, key_data, step_stats, train))


def inputs(seed=0):
  return np.random.default_rng(seed).normal(size=(B, L, D)).astype(np.float32)


def keys(seed=1):
  return np.random.default_rng(seed).integers(2**32, size=(B, 2), dtype=np.uint32)


def float64(variable):
  return None if variable is None else np.asarray(variable.get_value(), np.float64)


def silu(x):
  return x / (1 + np.exp(-x))


def reference_entries(moe, x_BLD, mask_BL, group):
  """The entries of every group as numpy fields [G, A], and the softmax scores [B, L, E]."""
  logits_BLE = x_BLD.astype(np.float64) @ float64(moe.w_router_DE)
  route = getattr(reference, moe.config.router)
  logits_GTE, mask_GT = logits_BLE.reshape(-1, group, E), mask_BL.reshape(-1, group)
  entries = [route(logits, K, BIAS_E, mask) for logits, mask in zip(logits_GTE, mask_GT, strict=True)]
  fields = [np.array([[entry[i] for entry in of_group] for of_group in entries]) for i in range(5)]
  scores_BLE = np.array([[reference.softmax(logits_E) for logits_E in row] for row in logits_BLE])
  return Assignment(*fields), scores_BLE


def reference_layer(moe, x_BLD, mask_BL, factor, group=L):
  """y_BLD, the entries, and which of them are kept. `factor=None`: no capacity."""
  assignment, _ = reference_entries(moe, x_BLD, mask_BL, group)
  weights = [float64(w) for w in (moe.w_gate_EDF, moe.w_up_EDF, moe.w_down_EFD)]
  capacity = None if factor is None else math.ceil(group * K * factor / E)
  x_GTD = x_BLD.reshape(-1, group, D)
  y_GTD, kept_GA, _ = moe_layer(x_GTD, assignment, weights, capacity, np.zeros_like(x_GTD))
  return y_GTD.reshape(x_BLD.shape), assignment, kept_GA


@pytest.mark.parametrize(
  "dispatcher, router",
  [
    ("einsum", "softmax_topk"),
    ("sorted", "softmax_topk"),
    ("dropless", "softmax_topk"),
    ("sorted", "gshard_top2"),
  ],
)
def test_output_and_counts_equal_the_reference(dispatcher, router):
  moe = make(change(dispatcher=dispatcher, router=router))
  x_BLD = inputs()
  factor = None if dispatcher == "dropless" else 0.5
  expected, assignment, kept_GA = reference_layer(moe, x_BLD, MASK_BL, factor)
  y_BLD, aux = forward(moe, x_BLD, MASK_BL, train=True)
  np.testing.assert_allclose(y_BLD, expected, rtol=1e-5, atol=1e-5)

  # Groups are sequences here.
  count = lambda of: [np.bincount(assignment.expert_A[b][of[b]], minlength=E) for b in range(B)]
  np.testing.assert_array_equal(aux.tokens_per_expert_BE, count(assignment.valid_A))
  np.testing.assert_array_equal(aux.kept_per_expert_E, np.sum(count(kept_GA), axis=0))
  assert aux.tokens_per_expert_BE.sum() == K * MASK_BL.sum()
  assert aux.num_tokens == MASK_BL.sum()

  lost_BL = np.ones((B, L), bool)
  lost_BL[np.nonzero(kept_GA)[0], assignment.token_A[kept_GA]] = False
  assert (lost_BL & MASK_BL).any() == (dispatcher != "dropless")  # the case has tokens that are lost whole
  assert np.all(y_BLD[lost_BL] == 0)
  assert np.all(lost_BL[~MASK_BL])


def test_losses_and_entropy_equal_the_reference():
  moe = make(CONFIG)
  x_BLD = inputs()
  assignment, scores_BLE = reference_entries(moe, x_BLD, MASK_BL, L)
  _, aux = forward(moe, x_BLD, MASK_BL)
  entropy_BL = -(scores_BLE * np.log(scores_BLE)).sum(axis=-1)
  np.testing.assert_allclose(aux.router_entropy, entropy_BL[MASK_BL].sum(), rtol=1e-5)

  counts_E = np.bincount(assignment.expert_A[assignment.valid_A], minlength=E)
  importance_E = scores_BLE[MASK_BL].mean(axis=0)
  loss = 0.5 * E * np.sum(counts_E / counts_E.sum() * importance_E)
  assert list(aux.losses) == ["switch_loss"]
  np.testing.assert_allclose(aux.losses["switch_loss"], loss, rtol=1e-5)
  for observed in jax.tree.leaves(aux.balancer_stats):
    np.testing.assert_array_equal(observed, counts_E)


def test_the_loss_reads_the_statistics_of_the_step():
  moe = make(change(balancers="switch_loss:0.5"))
  x_BLD, step_counts_E = inputs(), np.array([0, 0, 10, 0], np.float32)
  _, scores_BLE = reference_entries(moe, x_BLD, MASK_BL, L)
  _, aux = forward(moe, x_BLD, MASK_BL, step_stats=StepStats((step_counts_E,), None))
  expected = 0.5 * E * scores_BLE[MASK_BL].mean(axis=0)[2]
  np.testing.assert_allclose(aux.losses["switch_loss"], expected, rtol=1e-5)


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_shared_experts_see_every_token(activation):
  moe = make(change(num_shared_experts=2, expert_activation=activation))
  x_BLD = inputs()
  routed, _, _ = reference_layer(moe, x_BLD, MASK_BL, 1.0)
  up = x_BLD @ float64(moe.shared.w_up_DF)
  assert up.shape[-1] == 2 * F
  if activation == "swiglu":
    hidden = silu(x_BLD @ float64(moe.shared.w_gate_DF)) * up
  else:
    assert moe.w_gate_EDF is None and moe.shared.w_gate_DF is None
    hidden = np.maximum(up, 0)
  y_BLD, _ = forward(moe, x_BLD, MASK_BL)
  np.testing.assert_allclose(y_BLD, routed + hidden @ float64(moe.shared.w_down_FD), rtol=1e-5, atol=1e-5)


def test_evaluation_has_its_own_capacity():
  moe = make(CONFIG)
  x_BLD = inputs()
  kept = {}
  for train, factor in ((True, 0.5), (False, 1.0)):
    expected, _, kept_GA = reference_layer(moe, x_BLD, MASK_BL, factor)
    y_BLD, aux = forward(moe, x_BLD, MASK_BL, train=train)
    np.testing.assert_allclose(y_BLD, expected, rtol=1e-5, atol=1e-5)
    kept[train] = aux.kept_per_expert_E.sum()
    assert kept[train] == kept_GA.sum()
  assert kept[True] < kept[False]


def test_jitter_is_in_the_router_input_of_training_only():
  """With one expert, one feature and x = w = 1, the z-loss is the mean of the squared jitter."""
  config = MoEConfig(1, 1, F, balancers="z_loss:1", dispatcher="dropless", jitter=0.5)
  moe = make(config, dim=1)
  moe.w_router_DE.set_value(np.ones((1, 1), np.float32))
  x_BLD = np.ones((B, 300, 1), np.float32)
  y_BLD, aux = forward(moe, x_BLD, key_data=keys(), train=True)
  np.testing.assert_allclose(aux.losses["z_loss"], 1 + 0.5**2 / 3, atol=0.05)
  for without in ({"train": True}, {"key_data": keys()}):
    plain_BLD, aux = forward(moe, x_BLD, **without)
    # Another program, whose sums over B*300 tokens and F hidden units may round otherwise.
    assert aux.losses["z_loss"] == pytest.approx(1, rel=B * 300 * 2.0**-23)
    # Experts see what is not jittered.
    np.testing.assert_allclose(plain_BLD, y_BLD, atol=F * 2.0**-23 * np.abs(y_BLD).max())


def test_draws_belong_to_sequences():
  """Sequences in another order, with their keys, give the same outputs in that order."""
  moe = make(change(jitter=0.5, router="gshard_top2", capacity_factor=8.0))
  x_BLD, key_data, order = inputs(), keys(), np.array([2, 0, 1])
  y_BLD, _ = forward(moe, x_BLD, key_data=key_data, train=True)
  permuted, _ = forward(moe, x_BLD[order], key_data=key_data[order], train=True)
  # At another place of a product a row's F or D terms may be summed in another order: that many roundings by 2**-24.
  np.testing.assert_allclose(permuted, y_BLD[order], atol=(D + F) * 2.0**-23 * np.abs(y_BLD).max())
  other, _ = forward(moe, x_BLD, key_data=keys(seed=2), train=True)
  assert np.abs(other - y_BLD).max() > 1e-3


def test_the_router_works_in_float32():
  """Two experts whose weights bfloat16 cannot tell apart: rounded, the first would win the tie."""
  moe = make(change(num_experts_per_token=1, dispatcher="dropless", balancers="z_loss:1"))
  moe.w_router_DE.set_value(np.tile(np.float32([1.0, 1.001, -1.0, -1.0]), (D, 1)))
  x_BLD = (np.abs(inputs()) + 0.5).astype(jnp.bfloat16)
  rounded_BLE = x_BLD @ moe.w_router_DE.get_value().astype(jnp.bfloat16)
  assert np.all(np.argmax(rounded_BLE, axis=-1) == 0)
  y_BLD, aux = forward(moe, x_BLD)
  np.testing.assert_array_equal(aux.tokens_per_expert_BE, [[0, L, 0, 0]] * B)
  assert y_BLD.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(aux)} == {np.dtype(np.float32)}

  x = np.asarray(x_BLD, np.float64)
  gate, up, down = [float64(w)[1] for w in (moe.w_gate_EDF, moe.w_up_EDF, moe.w_down_EFD)]
  expected = (silu(x @ gate) * (x @ up)) @ down  # the softmax over one chosen expert is 1
  np.testing.assert_allclose(
    y_BLD.astype(np.float64), expected, rtol=0.05, atol=0.05 * np.abs(expected).max()
  )


def test_forward_mutates_nothing():
  moe = make(change(jitter=0.1))
  before = jax.device_get(nnx.to_pure_dict(nnx.state(moe)))
  call = lambda moe, x_BLD, key_data: moe(x_BLD, key_B=jax.random.wrap_key_data(key_data), train=True)
  nnx.jit(call)(moe, inputs(), keys())  # carries changes of the layer out of the compiled program
  after = jax.device_get(nnx.to_pure_dict(nnx.state(moe)))
  assert len(jax.tree.leaves(before)) == 5  # router, gate, up, down, bias
  jax.tree.map(np.testing.assert_array_equal, before, after)


def test_balancer_state_has_no_gradient():
  moe = make(change(router="sigmoid_topk"))
  graphdef, params, balancer = nnx.split(moe, nnx.Param, BalancerState)  # and nothing else is left
  assert all("balancer_state" not in path for path, _ in nnx.to_flat_state(params))

  def loss(params, balancer):
    y_BLD, aux = nnx.merge(graphdef, params, balancer)(inputs(), MASK_BL, train=True)
    return jnp.sum(y_BLD**2) + sum(aux.losses.values())

  of_params, of_balancer = jax.device_get(jax.jit(jax.grad(loss, argnums=(0, 1)))(params, balancer))
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(of_params))
  assert [np.abs(leaf).max() for leaf in jax.tree.leaves(of_balancer)] == [0]


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"router": "softmax_top"}, "unknown router 'softmax_top': did you mean softmax_topk"),
    ({"router": "gshard_top2", "num_experts_per_token": 1}, "num_experts_per_token=1"),
    ({"balancers": "none,swich_loss:0.1"}, "unknown balancer 'swich_loss': did you mean switch_loss"),
    ({"dispatcher": "sort"}, "unknown dispatcher 'sort': did you mean sorted"),
    ({"num_experts_per_token": E + 1}, f"num_experts_per_token={E + 1}"),
    (
      {"router": "expert_choice", "balancers": "loss_free_bias"},
      "by a bias, and router expert_choice takes none",
    ),
    ({"router": "group_limited_topk:groups=3"}, "groups=3"),
    ({"balancers": "load_loss"}, "reads the smooth load, which router softmax_topk does not give"),
    ({"router": "moe_plus_plus:zeros=2", "balancers": "heterogeneous_loss"}, "has 5; say zero_computation=5"),
  ],
)
def test_wrong_names_are_answered_at_construction(fields, words):
  with pytest.raises(InputError, match=words):
    make(change(**fields))


@pytest.mark.parametrize(
  "dispatcher, group_size", [("einsum", B * L), ("sorted", B * L), ("sorted", L // 2), ("dropless", L // 2)]
)
def test_the_group_size_does_not_matter_where_nothing_drops(dispatcher, group_size):
  moe = make(change(dispatcher=dispatcher, group_size=group_size, capacity_factor=float(E)))
  x_BLD = inputs()
  expected, assignment, _ = reference_layer(moe, x_BLD, MASK_BL, None)
  y_BLD, aux = forward(moe, x_BLD, MASK_BL, train=True)
  np.testing.assert_allclose(y_BLD, expected, rtol=1e-5, atol=1e-5)
  counts_E = np.bincount(assignment.expert_A[assignment.valid_A], minlength=E)
  np.testing.assert_array_equal(aux.kept_per_expert_E, counts_E)
  np.testing.assert_array_equal(aux.tokens_per_expert_BE.sum(axis=0), counts_E)


def test_the_group_size_is_what_capacity_counts_in():
  moe = make(change(group_size=4))
  x_BLD = inputs()
  expected, _, _ = reference_layer(moe, x_BLD, MASK_BL, 0.5, group=4)
  y_BLD, _ = forward(moe, x_BLD, MASK_BL, train=True)
  np.testing.assert_allclose(y_BLD, expected, rtol=1e-5, atol=1e-5)


def test_flat_tokens_are_a_batch_without_sequences():
  moe = make(CONFIG)
  x_BLD = inputs()
  y_BLD, aux = forward(moe, x_BLD[:1])
  y_TD, flat_aux = jax.device_get(moe(jnp.asarray(x_BLD[0])))
  np.testing.assert_allclose(y_TD, y_BLD[0], rtol=1e-5, atol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), flat_aux, aux)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"balancers": "switch_loss:0.1:scope=sequence"}, "balances within each sequence"),
    ({"balancers": "loss_free_bias,sequence_loss"}, "balances within each sequence"),
    ({"router": "sequence_level"}, "decides for whole sequences"),
  ],
)
def test_flat_tokens_are_refused_where_sequences_matter(fields, message):
  with pytest.raises(InputError, match=message):
    make(change(**fields))(jnp.zeros((L, D)))
