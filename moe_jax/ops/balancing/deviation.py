"""The squared deviation from balance: the form often printed, which has no gradient, and one that has a gradient."""

import jax
import jax.numpy as jnp

from moe_jax.errors import require_option
from moe_jax.ops.balancing.common import Balancer
from moe_jax.ops.balancing.importance import importance_loss
from moe_jax.ops.balancing.losses import SCOPES, all_choices, fractions, units


def squared_deviation_loss(
  weight: float = 0.01, of: str = "importance", scope: str = "global_batch"
) -> Balancer:
  """The squared distance of expert usage from 1/E. It is 0 at balance, unlike losses of the form f * p.

  of=load: weight * sum_e(c_e / A - 1/E)^2, which summaries of 2501.11873 print as its loss. The paper uses
    E * sum_e(f_e * p_e), which is `switch_loss`. The counts c_e are step functions of the logits, so the gradient
    of this form is zero. It is included only for comparison. The summaries' divisor, S, is read as the number of
    assignments A, K per token. With the number of tokens, the target would have to be K/E.
  of=importance: weight * E * sum_e(p_e - 1/E)^2, where p_e is the mean of the scores divided by their sum. This is
    the closest loss with a gradient. With the factor E, a weight means the same for every E: the loss is the squared
    coefficient of variation `importance_loss:of=scores`, and `switch_loss` minus 1 with p in place of f. It does
    not depend on the choices: all tokens may choose the same experts by a small margin while p is flat.

  `scope` is the same as for `switch_loss`.
  """
  require_option("balancer squared_deviation_loss", "of", of, ("load", "importance"))
  require_option("balancer squared_deviation_loss", "scope", scope, SCOPES)
  return _of_load(weight, scope) if of == "load" else importance_loss(weight, scope, of="scores")


def _of_load(weight: float, scope: str) -> Balancer:
  def losses(state, routing, step_stats):
    num_experts = routing.logits_BLE.shape[-1]
    unit = units(routing, scope)
    tokens_U = routing.mask_BL.reshape(-1, unit).sum(axis=1)
    counts_UE = all_choices(routing).reshape(-1, unit, num_experts).sum(axis=1)
    if scope in ("buffer", "global_batch"):
      counts_UE = (step_stats.whole if scope == "global_batch" else step_stats.so_far)[None]
    counts_UE = jax.lax.stop_gradient(counts_UE)
    deviation_U = jnp.sum((fractions(counts_UE) - 1 / num_experts) ** 2, axis=-1)
    return {"squared_deviation": weight * jnp.sum(tokens_U * deviation_U) / jnp.maximum(tokens_U.sum(), 1)}

  if scope not in ("buffer", "global_batch"):
    return Balancer(losses=losses, needs_sequences=scope == "sequence")
  observe = lambda state, routing: all_choices(routing).sum(axis=(0, 1))
  return Balancer(losses=losses, observe=observe, needs_whole_step=scope == "global_batch")
