"""Group-limited routers: the K experts of a token lie in few groups, so it travels to few devices.

Here the E experts are cut into P equal groups of neighbours (`groups`): the experts of one device or node.
A token first chooses its `groups_per_token` best groups, then its K best experts inside them.
"""

import jax.numpy as jnp

from moe_jax.errors import InputError, require_option
from moe_jax.ops.routing.common import (
  Router,
  apply_bias,
  full_mask,
  select_top_k,
  take_experts,
  token_major,
)
from moe_jax.ops.routing.topk import LOG_SCORES, weigh
from moe_jax.types import Array, Routing


def group_limited_topk(
  num_experts: int,
  num_experts_per_token: int,
  groups: int = 4,
  groups_per_token: int = 2,
  group_top: int = 2,
  score: str = "sigmoid",
  normalize: bool = True,
  scale: float = 1.0,
) -> Router:
  """Top-k within the best groups of experts.

  Args:
    groups: P equal groups of neighbouring experts.
    groups_per_token: M, how many of them a token may use. M = P is plain top-k.
    group_top: a group's score is the sum of its `group_top` best scores, bias included. 1: the best one
      (DeepSeek-V2, 2405.04434, section 2.2.2). 2: DeepSeek-V3 (2412.19437, section 2.1.2), whose text says
      K / M, and whose released code 2. Megatron-LM takes K // M, also for V2.
    score: softmax, sigmoid or sqrt_softplus of the logits.
    normalize: divide a token's weights by their sum.
    scale: multiplies the weights.

  Experts of the other groups are masked with minus infinity. A mask of 0, found in several codebases, lets
  them back in where the bias makes the scores of the chosen groups negative.

  Raises:
    InputError: groups that do not divide the experts, or too few experts in a token's groups.
  """
  require_option("router group_limited_topk", "score", score, tuple(LOG_SCORES))
  _check_groups(num_experts, num_experts_per_token, groups, groups_per_token, group_top)

  def route(
    logits_TE: Array, *, bias_E: Array | None = None, key: Array | None = None, mask_T: Array | None = None
  ) -> Routing:
    del key
    mask_T = full_mask(logits_TE, mask_T)
    log_scores_TE = LOG_SCORES[score](logits_TE)
    biased_TE = apply_bias(jnp.exp(log_scores_TE), bias_E)
    eligible_TE = _in_best_groups(biased_TE, groups, groups_per_token, group_top)
    expert_TK = select_top_k(jnp.where(eligible_TE, biased_TE, -jnp.inf), None, num_experts_per_token)
    weight_TK = weigh(log_scores_TE, expert_TK, normalize, scale)
    return Routing(logits_TE, log_scores_TE, mask_T, token_major(expert_TK, weight_TK, mask_T))

  return Router(route)


def _in_best_groups(biased_TE: Array, groups: int, groups_per_token: int, group_top: int) -> Array:
  """[T, E] bool: the experts of each token's best groups."""
  tokens, num_experts = biased_TE.shape
  per_group = num_experts // groups
  # Every group is a row with `per_group` columns, so that its best are found as a token's best are.
  rows = biased_TE.reshape(tokens * groups, per_group)
  best = take_experts(rows, select_top_k(rows, None, group_top))
  group_score_TP = best.sum(axis=-1).reshape(tokens, groups)
  chosen = select_top_k(group_score_TP, None, groups_per_token)  # [T, groups_per_token]
  group_E = jnp.arange(num_experts) // per_group
  return jnp.any(chosen[:, :, None] == group_E[None, None, :], axis=1)


def _check_groups(num_experts: int, k: int, groups: int, groups_per_token: int, group_top: int) -> None:
  if groups < 1 or num_experts % groups:
    raise InputError(
      f"router group_limited_topk: groups={groups} must divide num_experts={num_experts} into equal groups"
    )
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
) -> Router:
  """Device-limited routing of DeepSeek-V2 (2405.04434, section 2.2.2), defaults as released.

  Softmax over all experts, not normalised again; a group counts as much as its best expert. The released
  `scale` of 16 makes up for probabilities among 160 experts; with few experts use about 1.
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
) -> Router:
  """Node-limited routing of DeepSeek-V3 (2412.19437, eq. 12-16 and section 2.1.2), defaults as released.

  Sigmoid scores, weights divided by their sum; a group counts as much as its two best experts, with bias.
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
