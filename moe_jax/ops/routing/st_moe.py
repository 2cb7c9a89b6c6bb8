"""ST-MoE's top-n router: each expert after the first is used at random (2202.08906, appendix G)."""

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.ops.routing.common import Choice, choice_major, select_top_k, take_experts
from moe_jax.types import Array, RouterContext, Routing


def st_moe_topn(num_experts: int, num_experts_per_token: int, threshold: float = 0.2) -> Choice:
  """Always uses the best expert, and each further one of the K with probability min(1, weight / threshold).

  The weights are normalised over the K experts before any is skipped and not again after. Slots go to all first
  choices, then to all second ones, and so on. Only what is sent takes a slot, as in Mesh-TensorFlow: with K = 2
  this is `gshard_top2:threshold=0.2:slots=sent`. Without a key all K experts are used.

  Args:
    threshold: in (0, 1]; an expert with a weight of at least this is always used.
  """
  if not 0 < threshold <= 1:
    raise InputError(f"router st_moe_topn: threshold must be in (0, 1], got {threshold}")
  num_further = num_experts_per_token - 1

  def choose(logits_TE: Array, context: RouterContext) -> Routing:
    log_scores_TE = jax.nn.log_softmax(logits_TE, axis=-1)
    expert_TK = select_top_k(jnp.exp(log_scores_TE), context.bias_E, num_experts_per_token)
    # A probability divided by the sum of the K is the softmax over the K selected logits.
    weight_TK = jax.nn.softmax(take_experts(logits_TE, expert_TK), axis=-1)
    valid_TK = jnp.broadcast_to(context.mask[:, None], weight_TK.shape)
    if context.key is not None:
      draw_TX = jax.random.uniform(context.key, (context.mask.shape[0], num_further), jnp.float32)
      sent_TX = jax.lax.stop_gradient(weight_TK[:, 1:]) > threshold * draw_TX
      valid_TK &= jnp.concatenate([context.mask[:, None], sent_TX], axis=-1)
    assignment = choice_major(expert_TK, weight_TK, valid_TK, holds_slot_TK=valid_TK)
    return Routing(logits_TE, log_scores_TE, context.mask, assignment)

  return Choice(choose, leaks="drops" if num_further else "", replays=not num_further)
