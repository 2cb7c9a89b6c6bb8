"""ST-MoE's top-n router: random further experts for any K (2202.08906, appendix G)."""

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.ops.routing.common import Router, choice_major, full_mask, select_top_k, take_experts
from moe_jax.types import Array, Routing


def st_moe_topn(num_experts: int, num_experts_per_token: int, threshold: float = 0.2) -> Router:
  """The best expert always; each further one of the K with probability min(1, weight / threshold).

  The K weights are normalised over the K chosen before any expert is skipped and not again after. Slots go to
  all first choices, then to all second ones, ..., and only what is sent takes one, as in Mesh-TensorFlow: with
  K = 2 this is `gshard_top2:threshold=0.2:slots=sent`. Without a key all K experts are used.
  """
  if not 0 < threshold <= 1:
    raise InputError(f"router st_moe_topn: threshold must be in (0, 1], got {threshold}")
  num_further = num_experts_per_token - 1

  def route(
    logits_TE: Array, *, bias_E: Array | None = None, key: Array | None = None, mask_T: Array | None = None
  ) -> Routing:
    mask_T = full_mask(logits_TE, mask_T)
    log_scores_TE = jax.nn.log_softmax(logits_TE, axis=-1)
    expert_TK = select_top_k(jnp.exp(log_scores_TE), bias_E, num_experts_per_token)
    # The quotient of a probability and the sum of the K is the softmax over the K selected logits.
    weight_TK = jax.nn.softmax(take_experts(logits_TE, expert_TK), axis=-1)
    valid_TK = jnp.broadcast_to(mask_T[:, None], weight_TK.shape)
    if key is not None:
      draw_TK = jax.random.uniform(key, (mask_T.shape[0], num_further))
      sent_TK = jax.lax.stop_gradient(weight_TK[:, 1:]) > threshold * draw_TK
      valid_TK &= jnp.concatenate([mask_T[:, None], sent_TK], axis=-1)
    assignment = choice_major(expert_TK, weight_TK, valid_TK, holds_slot_TK=valid_TK)
    return Routing(logits_TE, log_scores_TE, mask_T, assignment)

  return Router(route, leaks="drops" if num_further else "")
