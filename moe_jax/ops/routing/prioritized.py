"""Batch-prioritised routing (V-MoE, 2106.05974): where capacity runs out, the least important tokens drop."""

import jax
import jax.numpy as jnp

from moe_jax.errors import require_option
from moe_jax.ops.routing.common import Choice, select_top_k, take_experts
from moe_jax.types import Array, Assignment, RouterContext, Routing


def batch_prioritized(num_experts: int, num_experts_per_token: int, priority: str = "max") -> Choice:
  """V-MoE's router (2106.05974, section 4): plain top-k, with slots given out by importance.

  Weights are the probabilities among all experts. Where nothing drops, this equals
  `softmax_topk:softmax=before`. The priority of a token is the `max` or the `sum` of its K weights. All first
  choices are placed before any second one, and so on. Each round goes by priority, as in the published code
  (google-research/vmoe, vmoe/moe.py), and tokens of equal priority keep their order. The paper's router also
  adds noise to the logits in training; for that see `vmoe_topk`.

  A later token can take the slot of an earlier one, so this leaks the future wherever capacity drops.
  """
  require_option("router batch_prioritized", "priority", priority, ("max", "sum"))

  def choose(logits_TE: Array, context: RouterContext) -> Routing:
    log_scores_TE = jax.nn.log_softmax(logits_TE, axis=-1)
    scores_TE = jnp.exp(log_scores_TE)
    expert_TK = select_top_k(scores_TE, context.bias_E, num_experts_per_token)
    weight_TK = take_experts(scores_TE, expert_TK)
    priority_T = weight_TK.max(axis=-1) if priority == "max" else weight_TK.sum(axis=-1)
    order_T = _highest_first(jnp.where(context.mask, priority_T, -jnp.inf))
    assignment = Assignment(
      token_A=jnp.tile(order_T, num_experts_per_token),
      expert_A=expert_TK[order_T].T.reshape(-1),
      weight_A=weight_TK[order_T].T.reshape(-1),
      valid_A=jnp.tile(context.mask[order_T], num_experts_per_token),
    )
    return Routing(logits_TE, log_scores_TE, context.mask, assignment)

  return Choice(choose, leaks="drops")


def _highest_first(priority_T: Array) -> Array:
  """Token indices by falling priority; equal ones keep their order."""
  return jnp.argsort(-jax.lax.stop_gradient(priority_T), stable=True).astype(jnp.int32)
