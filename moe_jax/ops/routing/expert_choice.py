"""Expert choice (2202.09368): the experts choose their tokens, not the tokens their experts."""

import jax
import jax.numpy as jnp

from moe_jax.ops.routing.common import Choice
from moe_jax.types import Array, Assignment, RouterContext, Routing


def expert_choice(num_experts: int, num_experts_per_token: int) -> Choice:
  """Every expert takes its n K / E best tokens of the group's n, rounded up (2202.09368, eq. 1 and 2).

  Scores are the softmax over experts, and each expert ranks the tokens by its own score. K is the paper's
  capacity factor: the average number of experts per token. Weights are the scores themselves, not normalised
  again. A token may be taken by any number of experts. One that no expert takes is carried by the residual
  connection. The load is equal by construction. n counts valid tokens only, so padding changes nothing.

  The entries of an expert come best first, and equal scores go to the lower token index. A capacity factor
  below 1 therefore keeps each expert's best tokens, which is the same method with a smaller n K / E.

  Leaks the future in a causal model, as the paper says: whether an expert takes a token depends on the scores
  of all others. For the same reason a group of one token, as in generation, goes to every expert.
  """

  def choose(logits_TE: Array, context: RouterContext) -> Routing:
    num_tokens = logits_TE.shape[0]
    log_scores_TE = jax.nn.log_softmax(logits_TE, axis=-1)
    scores_TE = jnp.exp(log_scores_TE)
    at_most = -(-num_tokens * num_experts_per_token // num_experts)
    taken = -(-jnp.sum(context.mask) * num_experts_per_token // num_experts)
    ranked_TE = jnp.where(context.mask[:, None], jax.lax.stop_gradient(scores_TE), -jnp.inf)
    # A sort over tokens: experts may be sharded, the tokens of a group are not.
    token_CE = jnp.argsort(-ranked_TE, axis=0, stable=True)[:at_most].astype(jnp.int32)
    weight_CE = jnp.take_along_axis(scores_TE, token_CE, axis=0)
    assignment = Assignment(
      token_A=token_CE.T.reshape(-1),
      expert_A=jnp.repeat(jnp.arange(num_experts, dtype=jnp.int32), at_most),
      weight_A=weight_CE.T.reshape(-1),
      valid_A=jnp.tile(jnp.arange(at_most) < taken, num_experts),
    )
    return Routing(logits_TE, log_scores_TE, context.mask, assignment)

  return Choice(choose, leaks="always", takes_bias=False)
