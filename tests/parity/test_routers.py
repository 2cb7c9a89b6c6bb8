"""Routers against those of Hugging Face transformers: the same experts, and weights equal to 1e-5."""

import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx

from moe_jax.nn import MoE
from moe_jax.ops.dispatch.slots import assign_slots
from moe_jax.ops.routing import make_choice
from moe_jax.ops.routing.hashing import table_topk
from moe_jax.ops.routing.topk import LOG_SCORES
from moe_jax.types import RouterContext
from tests.ops.choosing import route
from tests.parity import oracles

T, D, E, K = 64, 16, 16, 3
X_TD = oracles.normals(T, D, seed=1)
W_ED = oracles.normals(E, D, seed=2, scale=D**-0.5)
BIAS_E = np.random.default_rng(3).uniform(-0.3, 0.3, E).astype(np.float32)
GROUPS = {"n_group": 4, "topk_group": 2}


class Case(NamedTuple):
  """One router here and there."""

  model: str
  part: str
  fields: dict  # of the configuration there
  spec: str  # the router here
  biased: bool = False


def v3(fields, spec):
  return Case("deepseek_v3", "TopkRouter", {"n_routed_experts": E} | fields, spec, biased=True)


CASES = {
  "mixtral": Case("mixtral", "TopKRouter", {"num_local_experts": E}, "softmax_topk"),
  "qwen2_moe": Case(
    "qwen2_moe", "TopKRouter", {"num_experts": E, "norm_topk_prob": False}, "softmax_topk:softmax=before"
  ),
  "qwen2_moe_normalized": Case(
    "qwen2_moe", "TopKRouter", {"num_experts": E, "norm_topk_prob": True}, "softmax_topk"
  ),
  "olmoe": Case("olmoe", "TopKRouter", {"num_experts": E}, "softmax_topk:softmax=before"),
  "deepseek_v2_greedy": Case(
    "deepseek_v2",
    "TopkRouter",
    {"n_routed_experts": E, "topk_method": "greedy", "num_attention_heads": 2},
    "softmax_topk:softmax=before",
  ),
  "deepseek_v2_group_limited_greedy": Case(
    "deepseek_v2",
    "TopkRouter",
    {
      "n_routed_experts": E,
      "topk_method": "group_limited_greedy",
      "routed_scaling_factor": 16.0,
      "num_attention_heads": 2,
      **GROUPS,
    },
    "device_limited_topk:groups=4:groups_per_token=2",
  ),
  "deepseek_v3": v3(GROUPS, "node_limited_topk:groups=4:groups_per_token=2"),
  "deepseek_v3_plain_weights": v3(
    {"norm_topk_prob": False, **GROUPS},
    "group_limited_topk:groups=4:groups_per_token=2:normalize=false:scale=2.5",
  ),
  "deepseek_v3_without_groups": v3({"n_group": 1, "topk_group": 1}, "sigmoid_topk:normalize=true:scale=2.5"),
  "deepseek_v4": Case(
    "deepseek_v4", "TopKRouter", {"n_routed_experts": E}, "sqrt_softplus_topk:scale=1.5", biased=True
  ),
}


def theirs(case, x_TD=X_TD, w_ED=W_ED, bias_E=BIAS_E):
  """logits_TE, weights_TK, expert_TK."""
  router = oracles.build(
    case.model, case.part, hidden_size=x_TD.shape[1], num_experts_per_tok=K, **case.fields
  )
  oracles.load(router, weight=w_ED, **({"e_score_correction_bias": bias_E} if case.biased else {}))
  return oracles.call(router, x_TD)


def ours(choice, logits_TE, **context):
  """weights_TK, expert_TK of a choice whose assignments are in token order."""
  assignment = jax.device_get(jax.jit(functools.partial(route, choice))(logits_TE, **context)).assignment
  assert assignment.valid_A.all()
  np.testing.assert_array_equal(assignment.token_A, np.repeat(np.arange(T), K))
  return assignment.weight_A.reshape(T, K), assignment.expert_A.reshape(T, K)


def by_expert(values_TK, expert_TK, num_experts=E):
  """[T, E]; 0 where the token does not have the expert."""
  values_TE = np.zeros((len(expert_TK), num_experts), np.float32)
  np.put_along_axis(values_TE, expert_TK, values_TK, axis=1)
  return values_TE


def chosen(expert_TK):
  chosen_TE = by_expert(np.float32(1), expert_TK) > 0
  assert (chosen_TE.sum(axis=1) == K).all()  # K different ones
  return chosen_TE


def assert_equal(our, their):
  np.testing.assert_array_equal(chosen(our[1]), chosen(their[1]))
  np.testing.assert_allclose(by_expert(*our), by_expert(*their), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_same_experts_and_weights(name):
  case = CASES[name]
  logits_TE, *their = theirs(case)
  np.testing.assert_allclose(X_TD @ W_ED.T, logits_TE, rtol=1e-5, atol=1e-5)
  bias_E = BIAS_E if case.biased else None
  assert_equal(ours(make_choice(case.spec, E, K), X_TD @ W_ED.T, bias_E=bias_E), their)
  if case.biased:  # or the case would not test where the bias goes
    assert (chosen(theirs(case, bias_E=0 * BIAS_E)[2]) != chosen(their[1])).any()


@pytest.mark.parametrize("size", [1, 30])
def test_the_router_of_llama4(size):
  """It chooses by logits, which differ where sigmoids are all 1."""
  config = oracles.transformers.Llama4TextConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=K)
  router = oracles.modeling("llama4").Llama4Router(config)
  oracles.load(router, weight=size * W_ED)
  weight_TE, logits_TE = oracles.call(router, X_TD)
  assert ((weight_TE == 1).sum(axis=1) >= K).any() == (size > 1)
  expert_TK = np.argsort(-logits_TE, axis=1)[:, :K]
  their = np.take_along_axis(weight_TE, expert_TK, axis=1), expert_TK
  assert_equal(ours(make_choice("llama4_topk", E, K), logits_TE), their)


def test_the_router_of_gemma4():
  scale_D, scale_E = (np.random.default_rng(n).uniform(0.5, 3, n).astype(np.float32) for n in (D, E + 1))
  scale_E = scale_E[:E]
  theirs = oracles.build("gemma4", "Router", hidden_size=D, num_experts=E, top_k_experts=K)
  oracles.load(theirs, **{"proj.weight": W_ED, "scale": scale_D, "per_expert_scale": scale_E})
  scores_TE, *their = oracles.call(theirs, X_TD)
  router = MoE(
    D, num_experts=E, num_experts_per_token=K, expert_dim=2, router="gemma4_topk", rngs=nnx.Rngs(0)
  ).router
  for variable, value in ((router.w_router_DE, W_ED.T), (router.scale_D, scale_D), (router.scale_E, scale_E)):
    variable.set_value(value)
  routing = jax.device_get(router(X_TD[None], RouterContext(np.ones((1, T), bool))))
  np.testing.assert_allclose(np.exp(routing.log_scores_TE[0]), scores_TE, rtol=1e-5)
  a = routing.assignment
  assert_equal((a.weight_A.reshape(T, K), a.expert_A.reshape(T, K)), their)
  assert np.ptp(by_expert(*their).sum(axis=1)) > 0.5  # the scales of the experts show


def test_the_hash_layers_of_deepseek_v4():
  vocabulary = 10
  table_VK = np.stack([np.random.default_rng(v).permutation(E)[:K] for v in range(vocabulary)])
  token_id_T = np.random.default_rng(4).integers(0, vocabulary, T)
  router = oracles.build(
    "deepseek_v4",
    "HashRouter",
    hidden_size=D,
    num_experts_per_tok=K,
    n_routed_experts=E,
    vocab_size=vocabulary,
    routed_scaling_factor=2.5,
  )
  oracles.load(router, weight=W_ED, tid2eid=table_VK)
  _, *their = oracles.call(router, X_TD, token_id_T)
  choice = table_topk(table_VK, E, LOG_SCORES["sqrt_softplus"], scale=2.5)
  assert_equal(ours(choice, X_TD @ W_ED.T, token_id=token_id_T.astype(np.int32)), their)


def groups_of(expert_TK):
  """How many groups each token uses."""
  return chosen(expert_TK).reshape(T, GROUPS["n_group"], -1).any(axis=-1).sum(axis=-1)


def test_groups_are_excluded_by_minus_infinity_and_not_by_zero():
  """Where the bias makes every score negative, a mask of 0 prefers the excluded groups.

  DeepSeek masks with minus infinity (deepseek-ai/DeepSeek-V3, inference/model.py, class Gate). The V3 of
  transformers had the 0 (huggingface/transformers#45440) and no longer has it. A.X-K2 there, otherwise the same
  router, still does: all that it chooses are experts of groups that it excluded.
  """
  case = CASES["deepseek_v3"]
  bias_E = BIAS_E - 2
  our = ours(make_choice(case.spec, E, K), X_TD @ W_ED.T, bias_E=bias_E)
  _, *their = theirs(case, bias_E=bias_E)
  assert_equal(our, their)
  assert (groups_of(our[1]) <= GROUPS["topk_group"]).all()

  _, _, expert_TK = theirs(case._replace(model="axk2"), bias_E=bias_E)
  in_our_groups_TE = np.repeat(chosen(our[1]).reshape(T, 4, -1).any(axis=-1), E // 4, axis=-1)
  assert not (chosen(expert_TK) & in_our_groups_TE).any()
  # Where no score is negative, it is the same router.
  _, *same = theirs(case._replace(model="axk2"), bias_E=BIAS_E + 2)
  assert_equal(ours(make_choice(case.spec, E, K), X_TD @ W_ED.T, bias_E=BIAS_E + 2), same)


def test_the_zero_mask_of_deepseek_v2_moves_no_weight():
  """Softmax scores are never negative, so the 0 is harmless there: an excluded expert that it lets in, where the
  scores of the token's own groups underflow, has weight 0."""
  case = CASES["deepseek_v2_group_limited_greedy"]
  logits_TE, weight_TK, expert_TK = theirs(case, w_ED=300 * W_ED)
  assert (weight_TK == 0).any()
  # Their logits: at this size the rounding of a product is more than 1e-5 of an exponential.
  our = ours(make_choice(case.spec, E, K), logits_TE)
  np.testing.assert_allclose(by_expert(*our), by_expert(weight_TK, expert_TK), rtol=1e-5, atol=1e-6)
  assert (groups_of(our[1]) <= GROUPS["topk_group"]).all()


def test_no_epsilon_in_the_sum_of_weights():
  """Eq. 13 of 2412.19437 divides by the sum alone, as the released inference code does. The 1e-20 that transformers adds takes over where scores are
  small: a router could switch its layer off that way."""
  case = CASES["deepseek_v3_without_groups"]
  x_TD = np.concatenate([X_TD, np.ones((T, 1), np.float32)], axis=1)
  w_ED = np.concatenate([W_ED, np.full((E, 1), -48, np.float32)], axis=1)
  _, weight_TK, _ = theirs(case, x_TD, w_ED)
  our_TK, _ = ours(make_choice(case.spec, E, K), x_TD @ w_ED.T, bias_E=BIAS_E)
  np.testing.assert_allclose(our_TK.sum(axis=1), 2.5, rtol=1e-5)
  assert (weight_TK.sum(axis=1) < 0.9 * 2.5).all()


def kept_weights(choice, logits_GTE, capacity):
  """weights_GTE of the assignments that find a slot, and which ones do [G, T, E]."""

  def keep(logits_TE):
    assignment = route(choice, logits_TE).assignment
    return assignment, assign_slots(assignment, *logits_TE.shape, capacity).kept_A

  assignment, kept_GA = jax.device_get(jax.jit(jax.vmap(keep))(logits_GTE))
  group_GA = np.broadcast_to(np.arange(len(logits_GTE))[:, None], kept_GA.shape)
  where = (group_GA[kept_GA], assignment.token_A[kept_GA], assignment.expert_A[kept_GA])
  weights_GTE, kept_GTE = np.zeros(logits_GTE.shape, np.float32), np.zeros(logits_GTE.shape, bool)
  weights_GTE[where] = assignment.weight_A[kept_GA]
  kept_GTE[where] = True
  return weights_GTE, kept_GTE


@pytest.mark.parametrize("capacity", [2, 16])
def test_switch_with_capacity(capacity):
  router = oracles.build(
    "switch_transformers", "Top1Router", d_model=D, num_experts=E, expert_capacity=capacity, router_bias=False
  )
  oracles.load(router, **{"classifier.weight": W_ED})
  x_GTD = X_TD.reshape(4, 16, D)
  kept_there_GTE, probability_GTO, _ = oracles.call(router, x_GTD)
  weights_GTE, kept_GTE = kept_weights(make_choice("switch_top1", E, 1), x_GTD @ W_ED.T, capacity)
  np.testing.assert_array_equal(kept_GTE, kept_there_GTE.astype(bool))
  np.testing.assert_allclose(weights_GTE, kept_there_GTE * probability_GTO, rtol=1e-5, atol=1e-6)
  assert (kept_GTE.sum() == T) == (capacity == 16)


def nllb(fraction=1.0, **fields):
  """Weights [T, E] of the top-2 router after dropping, where an expert has fraction * T slots."""
  router = oracles.build(
    "nllb_moe",
    "Top2Router",
    d_model=D,
    num_experts=E,
    moe_eval_capacity_token_fraction=fraction,
    normalize_router_prob_before_dropping=True,
    router_bias=False,
    **fields,
  )
  oracles.load(router, **{"classifier.weight": W_ED})
  return oracles.call(router, X_TD)[1]


@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("fraction", [1 / 16, 1.0])
def test_top2_of_nllb_moe_with_capacity(fraction, prioritized):
  """Every second choice is sent: GShard's router without a key, and with priorities that of V-MoE, whose weights
  are not divided by their sum in the paper and are so there."""
  their_TE = nllb(fraction, second_expert_policy="all", batch_prioritized_routing=prioritized)
  choice = make_choice("batch_prioritized" if prioritized else "gshard_top2", E, 2)
  logits_GTE = (X_TD @ W_ED.T)[None]
  weights_TE, kept_TE = (x[0] for x in kept_weights(choice, logits_GTE, round(fraction * T)))
  if prioritized:
    all_TE = kept_weights(choice, logits_GTE, T)[0][0]
    weights_TE = weights_TE / all_TE.sum(axis=1, keepdims=True)
  np.testing.assert_array_equal(kept_TE, their_TE > 0)
  np.testing.assert_allclose(weights_TE, their_TE, rtol=1e-5, atol=1e-6)
  assert (kept_TE.sum() == 2 * T) == (fraction == 1)


def test_random_second_experts_of_nllb_moe_lose_their_normalization(monkeypatch):
  """GShard (2006.16668, Algorithm 1) divides both gates by their sum, draws with 2 g2 and weighs with g2. NLLB-MoE
  in transformers puts the plain probability back for the draw and weighs with that."""
  monkeypatch.setattr(oracles.torch, "rand_like", oracles.torch.zeros_like)  # every second choice is sent
  their_TE = nllb(second_expert_policy="random")
  logits_TE = X_TD @ W_ED.T
  our_TE = kept_weights(make_choice("gshard_top2", E, 2), logits_TE[None], T)[0][0]
  probs_TE = np.asarray(jax.nn.softmax(logits_TE, axis=-1))
  is_first_TE = probs_TE == probs_TE.max(axis=1, keepdims=True)
  np.testing.assert_allclose(np.where(is_first_TE, our_TE - their_TE, 0), 0, atol=1e-6)
  is_second_TE = (our_TE > 0) & ~is_first_TE
  np.testing.assert_allclose(their_TE[is_second_TE], probs_TE[is_second_TE], rtol=1e-5)
  np.testing.assert_allclose(our_TE.sum(axis=1), 1, rtol=1e-5)
  assert (their_TE.sum(axis=1) < 0.999).all()
