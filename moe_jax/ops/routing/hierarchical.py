"""Two gates, one behind the other: the first chooses groups of experts, the second experts within them.

Scores: the product of both softmaxes, over all groups and experts and without noise.
Bias: added to the softmax within a group, and its mean over a group's experts to the softmax over groups; else
it could move no load between groups.
Smooth load: the product of both levels' probabilities, a number per token. Eq. 14 of 1701.06538 multiplies sums
over the batch instead, which would not add over micro-batches.

Further axes here: M groups of P experts each, so E = M * P; J groups of a token, I experts in each of them.
"""

from typing import NamedTuple

import jax

from moe_jax.errors import InputError, require_option
from moe_jax.ops.routing.common import Router, full_mask, select_top_k, take_experts, token_major
from moe_jax.ops.routing.noisy import add_noise, learned_std, real_tokens, win_probability
from moe_jax.types import Array, ExpertScale, Routing


def hierarchical_topk(
  num_experts: int,
  num_experts_per_token: int,
  groups: int = 4,
  groups_per_token: int = 2,
  noise: str = "learned",
  min_std: float = 0.01,
) -> Router:
  """Hierarchical mixture of experts (1701.06538, appendix B): weight = gate of the group * gate of the expert.

  The E experts in order are cut into `groups`. A token takes `groups_per_token` of them, and
  K / groups_per_token experts in each (the paper: 2 and 2). Each gate is the softmax over what it chose, so a
  token's weights sum to 1, and a gate that chooses one thing only gets no gradient from them. The logits of
  the groups are side logits; those of the experts are compared within a group only. One group is `noisy_topk`.

  noise: `learned` is that of `noisy_topk`, at both levels, with its `min_std` and its start at 0; `none` has
    neither noise nor a smooth load. There is no noise without a key either.
  """
  _check(num_experts, num_experts_per_token, groups, groups_per_token, noise, min_std)
  is_noisy = noise == "learned"
  inner_k = num_experts_per_token // groups_per_token
  by_group = lambda x_TE: x_TE.reshape(-1, groups, num_experts // groups)

  def route(
    logits_TE: Array,
    *,
    side_logits_TX: Array,
    bias_E: Array | ExpertScale | None = None,
    key: Array | None = None,
    mask_T: Array | None = None,
  ) -> Routing:
    mask_T = full_mask(logits_TE, mask_T)
    outer_key, inner_key = (None, None) if key is None else jax.random.split(key)
    bias_MP = jax.tree.map(lambda b_E: b_E.reshape(groups, -1), bias_E)
    bias_M = jax.tree.map(lambda b_MP: b_MP.mean(axis=-1), bias_MP)

    side_TX = real_tokens(side_logits_TX, mask_T)
    noise_TM, noise_TE = side_TX[:, groups : 2 * groups], side_TX[:, 2 * groups :]  # no columns: no noise
    outer = _gate(_noisy(side_TX[:, :groups], noise_TM, outer_key, min_std), bias_M, groups_per_token)
    # The choice within every group, chosen or not: static shapes, and cheap.
    inner_logits = _noisy(real_tokens(logits_TE, mask_T), noise_TE, inner_key, min_std)
    gate_in_group = lambda logits, bias_P: _gate(logits, bias_P, inner_k)
    inner = jax.vmap(gate_in_group, in_axes=(1, 0), out_axes=1)(jax.tree.map(by_group, inner_logits), bias_MP)

    of_chosen_groups = jax.vmap(take_experts, in_axes=(2, None), out_axes=2)  # [T, M, I] -> [T, J, I]
    member_TJI = of_chosen_groups(inner.index_TK, outer.index_TK)
    expert_TJI = outer.index_TK[:, :, None] * (num_experts // groups) + member_TJI
    weight_TJI = outer.weight_TK[:, :, None] * of_chosen_groups(inner.weight_TK, outer.index_TK)
    flat = lambda x_TJI: x_TJI.reshape(-1, num_experts_per_token)
    return Routing(
      logits_TE,
      _log_scores(by_group(logits_TE), side_logits_TX[:, :groups]),
      mask_T,
      token_major(flat(expert_TJI), flat(weight_TJI), mask_T),
      smooth_load_TE=(outer.win_TN[:, :, None] * inner.win_TN).reshape(logits_TE.shape) if is_noisy else None,
    )

  return Router(
    route,
    reads=("side_logits_TX",),
    gives_smooth_load=is_noisy,
    num_side_logits=2 * groups + num_experts if is_noisy else groups,
    zero_init=is_noisy,  # without noise, equal logits would send every token to the first experts
  )


class _NoisyLogits(NamedTuple):
  clean_TN: Array
  noisy_TN: Array
  std_TN: Array | None  # None: no noise


class _Gate(NamedTuple):
  index_TK: Array  # best first
  weight_TK: Array  # sum to 1
  win_TN: Array | None  # the smooth load


def _noisy(clean_TN: Array, side_TN: Array, key: Array | None, min_std: float) -> _NoisyLogits:
  if side_TN.shape[-1] == 0:
    return _NoisyLogits(clean_TN, clean_TN, None)
  std_TN = learned_std(side_TN, min_std)
  return _NoisyLogits(clean_TN, add_noise(clean_TN, std_TN, key), std_TN)


def _gate(logits: _NoisyLogits, bias_N: Array | ExpertScale | None, k: int) -> _Gate:
  """One gate, that takes k of N things."""
  clean_TN, noisy_TN, std_TN = logits
  index_TK = select_top_k(jax.nn.softmax(noisy_TN, axis=-1), bias_N, k)
  weight_TK = jax.nn.softmax(take_experts(noisy_TN, index_TK), axis=-1)
  return _Gate(
    index_TK, weight_TK, None if std_TN is None else win_probability(clean_TN, noisy_TN, std_TN, k)
  )


def _log_scores(logits_TMP: Array, logits_TM: Array) -> Array:
  joint_TMP = jax.nn.log_softmax(logits_TM, axis=-1)[:, :, None] + jax.nn.log_softmax(logits_TMP, axis=-1)
  return joint_TMP.reshape(logits_TM.shape[0], -1)


def _check(num_experts: int, k: int, groups: int, groups_per_token: int, noise: str, min_std: float) -> None:
  name = "router hierarchical_topk"
  require_option(name, "noise", noise, ("learned", "none"))
  if not min_std > 0:
    raise InputError(f"{name}: min_std must be above 0, got {min_std}")
  if groups < 1 or num_experts % groups:
    raise InputError(f"{name}: groups must divide --num_experts={num_experts}, got {groups}")
  if not 1 <= groups_per_token <= groups:
    raise InputError(f"{name}: groups_per_token must be in [1, groups={groups}], got {groups_per_token}")
  if k % groups_per_token:
    raise InputError(
      f"{name}: groups_per_token must divide --num_experts_per_token={k}, got {groups_per_token}"
    )
  if k // groups_per_token > num_experts // groups:
    raise InputError(
      f"{name}: --num_experts_per_token={k} takes {k // groups_per_token} experts in each of {groups_per_token} "
      f"groups, and a group has {num_experts // groups}; use fewer, or more groups_per_token"
    )
