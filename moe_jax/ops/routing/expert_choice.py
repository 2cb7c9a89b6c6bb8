"""Expert choice (2202.09368): the experts choose their tokens, not the tokens their experts."""

import jax
import jax.numpy as jnp

from moe_jax.ops.routing.common import Router, full_mask
from moe_jax.types import Array, Assignment, Routing


def expert_choice(num_experts: int, num_experts_per_token: int) -> Router:
  """Every expert takes its k = n K / E best of the group's n tokens (2202.09368, eq. 1 and 2), rounded up.

  The scores are a softmax over experts, S = softmax(logits), and an expert compares its column of them. The
  paper's capacity factor c, the average number of experts of a token, is K. Weights are the scores
  themselves, never renormalised: a token may be taken by any number of experts, also by none, and is then
  carried by the residual. Load is equal by construction. n counts valid tokens, so padding a group changes
  nothing.

  An expert's entries come best first: a capacity factor below 1 keeps its best tokens, which is the
  same method with a smaller k. Equal scores go to the lower token index.

  Leaks the future in a causal model, as the paper says: whether an expert takes a token depends on the scores
  of all others. For the same reason a group of one token, as in generation, is sent to every expert.
  """

  def route(
    logits_TE: Array, *, bias_E: Array | None = None, key: Array | None = None, mask_T: Array | None = None
  ) -> Routing:
    del bias_E, key
    mask_T = full_mask(logits_TE, mask_T)
    num_tokens = logits_TE.shape[0]
    log_scores_TE = jax.nn.log_softmax(logits_TE, axis=-1)
    scores_TE = jnp.exp(log_scores_TE)
    at_most = -(-num_tokens * num_experts_per_token // num_experts)
    taken = -(-jnp.sum(mask_T) * num_experts_per_token // num_experts)
    ranked_TE = jnp.where(mask_T[:, None], jax.lax.stop_gradient(scores_TE), -jnp.inf)
    # A sort over tokens: experts may be sharded, the tokens of a group are not.
    token_CE = jnp.argsort(-ranked_TE, axis=0, stable=True)[:at_most].astype(jnp.int32)
    weight_CE = jnp.take_along_axis(scores_TE, token_CE, axis=0)
    assignment = Assignment(
      token_A=token_CE.T.reshape(-1),
      expert_A=jnp.repeat(jnp.arange(num_experts, dtype=jnp.int32), at_most),
      weight_A=weight_CE.T.reshape(-1),
      valid_A=jnp.tile(jnp.arange(at_most) < taken, num_experts),
    )
    return Routing(logits_TE, log_scores_TE, mask_T, assignment)

  return Router(route, leaks="always", takes_bias=False)
