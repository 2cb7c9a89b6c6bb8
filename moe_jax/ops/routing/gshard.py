"""GShard's top-2 router with a random second expert (2006.16668, Algorithm 1)."""

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError, require_option
from moe_jax.ops.routing.common import Choice, choice_major, select_top_k, take_experts
from moe_jax.types import Array, RouterContext, Routing


def gshard_top2(
  num_experts: int, num_experts_per_token: int, threshold: float = 0.5, slots: str = "all"
) -> Choice:
  """GShard top-2: the second expert is used with probability min(1, g2 / threshold).

  g1 and g2 are the weights of the two experts, normalised over the pair before anything is dropped and not
  again after. All first choices are placed before any second one. Without a key every second choice is used.
  The paper has `threshold` 0.5 (its condition is `2 * g2 > rnd`) and capacity 2T/E, which is
  `capacity_factor` 1.

  Args:
    threshold: in (0, 1]; a second expert with a weight of at least this is always used.
    slots: which second choices take a slot. The paper and Mesh-TensorFlow (transformer/moe.py) differ here.
      `all`: all of them. The slot of one that is not sent stays empty, because the counter `c_e` of Algorithm
      1 grows in any case. `sent`: only those that are sent; Mesh-TensorFlow is `threshold=0.2:slots=sent`.

  Raises:
    InputError: K is not 2, or a wrong option.
  """
  if num_experts_per_token != 2:
    raise InputError(f"num_experts_per_token={num_experts_per_token}: router gshard_top2 takes 2")
  if not 0 < threshold <= 1:
    raise InputError(f"router gshard_top2: threshold must be in (0, 1], got {threshold}")
  require_option("router gshard_top2", "slots", slots, ("all", "sent"))

  def choose(logits_TE: Array, context: RouterContext) -> Routing:
    mask_T = context.mask
    log_scores_TE = jax.nn.log_softmax(logits_TE, axis=-1)
    expert_TK = select_top_k(jnp.exp(log_scores_TE), context.bias_E, 2)
    # g / (g1 + g2) is the softmax over the two selected logits.
    weight_TK = jax.nn.softmax(take_experts(logits_TE, expert_TK), axis=-1)
    if context.key is None:
      second_T = mask_T
    else:
      draw_T = jax.random.uniform(context.key, mask_T.shape, jnp.float32)
      second_T = mask_T & (jax.lax.stop_gradient(weight_TK[:, 1]) > threshold * draw_T)
    valid_TK = jnp.stack([mask_T, second_T], axis=-1)
    holds_slot_TK = valid_TK if slots == "sent" else jnp.stack([mask_T, mask_T], axis=-1)
    assignment = choice_major(expert_TK, weight_TK, valid_TK, holds_slot_TK)
    return Routing(logits_TE, log_scores_TE, mask_T, assignment)

  return Choice(choose, leaks="drops", replays=False)
