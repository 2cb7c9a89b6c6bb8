"""Routers with groups of experts: the K experts of a token lie in few groups, or equally many in every group.

The E experts are cut into P equal groups of neighbours, such as the experts of one device or node. If the groups
are few, a token travels to few devices: it chooses its W best groups, then its K best experts within them. If
every group has equally many, all devices have the same load. Groups of experts have the axis P, because G stands
for groups of tokens.
"""

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError, require_option
from moe_jax.ops.routing.common import (
  Choice,
  apply_bias,
  select_top_k,
  take_experts,
  token_major,
)
from moe_jax.ops.routing.topk import LOG_SCORES, weigh
from moe_jax.types import Array, RouterContext, Routing


def group_limited_topk(
  num_experts: int,
  num_experts_per_token: int,
  groups: int = 4,
  groups_per_token: int = 2,
  group_top: int = 2,
  score: str = "sigmoid",
  normalize: bool = True,
  scale: float = 1.0,
) -> Choice:
  """Top-k within the best groups of experts.

  Experts of the other groups are masked with minus infinity. Several codebases mask with 0, which lets these
  experts back in where the bias makes the scores of the chosen groups negative.

  Args:
    groups: P, the number of groups of neighbouring experts.
    groups_per_token: W, how many of them a token may use. W = P is plain top-k.
    group_top: the score of a group is the sum of its `group_top` best scores, bias included. DeepSeek-V2
      (2405.04434, section 2.2.2) has 1. DeepSeek-V3 (2412.19437, section 2.1.2) has K / W in the paper and 2
      in the released code. Megatron-LM has K // W, also for V2.
    score: softmax, sigmoid or sqrt_softplus of the logits.
    normalize: divide a token's weights by their sum.
    scale: multiplies the weights.

  Raises:
    InputError: P does not divide E, or W groups have fewer than K experts, or a wrong option.
  """
  require_option("router group_limited_topk", "score", score, tuple(LOG_SCORES))
  _check_groups(num_experts, num_experts_per_token, groups, groups_per_token, group_top)

  def choose(logits_TE: Array, context: RouterContext) -> Routing:
    log_scores_TE = LOG_SCORES[score](logits_TE)
    biased_TE = apply_bias(jnp.exp(log_scores_TE), context.bias_E)
    eligible_TE = _in_best_groups(biased_TE, groups, groups_per_token, group_top)
    expert_TK = select_top_k(jnp.where(eligible_TE, biased_TE, -jnp.inf), None, num_experts_per_token)
    weight_TK = weigh(log_scores_TE, expert_TK, normalize, scale)
    return Routing(logits_TE, log_scores_TE, context.mask, token_major(expert_TK, weight_TK, context.mask))

  return Choice(choose)


def _in_best_groups(biased_TE: Array, groups: int, groups_per_token: int, group_top: int) -> Array:
  """[T, E] bool: the experts of each token's best groups."""
  tokens, num_experts = biased_TE.shape
  per_group = num_experts // groups
  # Each group becomes a row, so that its best scores are found in the same way as a token's best experts.
  rows_XO = biased_TE.reshape(tokens * groups, per_group)
  best_XY = take_experts(rows_XO, select_top_k(rows_XO, None, group_top))
  group_score_TP = best_XY.sum(axis=-1).reshape(tokens, groups)
  group_TW = select_top_k(group_score_TP, None, groups_per_token)
  group_E = jnp.arange(num_experts) // per_group
  return jnp.any(group_TW[:, :, None] == group_E[None, None, :], axis=1)


def _check_equal_groups(router: str, num_experts: int, groups: int) -> None:
  if groups < 1 or num_experts % groups:
    raise InputError(
      f"router {router}: groups={groups} must divide num_experts={num_experts} into equal groups"
    )


def _check_groups(num_experts: int, k: int, groups: int, groups_per_token: int, group_top: int) -> None:
  _check_equal_groups("group_limited_topk", num_experts, groups)
  per_group = num_experts // groups
  if not 1 <= groups_per_token <= groups:
    raise InputError(
      f"router group_limited_topk: groups_per_token={groups_per_token} must be between 1 and groups={groups}"
    )
  if groups_per_token * per_group < k:
    raise InputError(
      f"router group_limited_topk: {groups_per_token} groups of {per_group} experts per token are fewer than "
      f"num_experts_per_token={k}; use fewer groups or more groups_per_token"
    )
  if not 1 <= group_top <= per_group:
    raise InputError(
      f"router group_limited_topk: group_top={group_top} must be between 1 and the {per_group} experts of a "
      f"group (num_experts={num_experts}, groups={groups})"
    )


def device_limited_topk(
  num_experts: int,
  num_experts_per_token: int,
  groups: int = 8,
  groups_per_token: int = 3,
  scale: float = 16.0,
) -> Choice:
  """Device-limited routing of DeepSeek-V2 (2405.04434, section 2.2.2), defaults as released.

  Weights are the softmax over all experts, not normalised again. The score of a group is that of its best
  expert. The released `scale` of 16 makes up for the small probabilities among 160 experts; with few experts
  use about 1.
  """
  return group_limited_topk(
    num_experts,
    num_experts_per_token,
    groups,
    groups_per_token,
    group_top=1,
    score="softmax",
    normalize=False,
    scale=scale,
  )


def node_limited_topk(
  num_experts: int,
  num_experts_per_token: int,
  groups: int = 8,
  groups_per_token: int = 4,
  scale: float = 2.5,
) -> Choice:
  """Node-limited routing of DeepSeek-V3 (2412.19437, eq. 12-16 and section 2.1.2), defaults as released.

  Scores are sigmoids, and a token's weights are divided by their sum. The score of a group is the sum of its
  two best scores, bias included.
  """
  return group_limited_topk(
    num_experts,
    num_experts_per_token,
    groups,
    groups_per_token,
    group_top=2,
    score="sigmoid",
    normalize=True,
    scale=scale,
  )


def grouped_topk(
  num_experts: int, num_experts_per_token: int, groups: int = 0, normalize: bool = False
) -> Choice:
  """Mixture of grouped experts (Pangu Pro MoE, 2505.21411, eq. 5-7): the K/P best experts of each of P groups.

  The opposite of a group limit. With the experts of a group on one device, all devices do the same work for every
  token, whatever the router has learned. Scores are the softmax over all E experts, and the weights are the scores
  of the chosen experts, not divided by their sum; `normalize` divides them. The equations are known from a summary of
  the paper, which was not re-read. They agree with the code that serves the released model (vllm-ascend,
  models/pangu_moe.py), except that there each weight is multiplied by a learned scale of its expert, which is not
  here.

  The assignment of a token lists group after group, each with its best expert first. A bias moves the choice
  within the groups.

  Args:
    groups: P, the number of groups of neighbouring experts; 0: K, so one expert of each group, as in Pangu Pro MoE
      (64 experts, K = 8).
    normalize: divide a token's weights by their sum.

  Raises:
    InputError: if P does not divide both E and K.
  """
  groups = groups or num_experts_per_token
  _check_equal_groups("grouped_topk", num_experts, groups)
  if num_experts_per_token % groups:
    raise InputError(
      f"router grouped_topk: groups={groups} must divide num_experts_per_token={num_experts_per_token}, so that "
      "a token has equally many experts in every group"
    )

  def choose(logits_TE: Array, context: RouterContext) -> Routing:
    log_scores_TE = jax.nn.log_softmax(logits_TE, axis=-1)
    biased_TE = apply_bias(jnp.exp(log_scores_TE), context.bias_E)
    rows_XO = biased_TE.reshape(-1, num_experts // groups)  # a row for each token and group
    best_XY = select_top_k(rows_XO, None, num_experts_per_token // groups)
    first_of_P = jnp.arange(groups, dtype=jnp.int32) * (num_experts // groups)
    expert_TPY = best_XY.reshape(-1, groups, best_XY.shape[-1]) + first_of_P[None, :, None]
    expert_TK = expert_TPY.reshape(-1, num_experts_per_token)
    weight_TK = weigh(log_scores_TE, expert_TK, normalize, 1.0)
    return Routing(logits_TE, log_scores_TE, context.mask, token_major(expert_TK, weight_TK, context.mask))

  return Choice(choose)
