"""Losses that are added to the language-model loss. Each is weight x 1 at perfect balance."""

import jax
import jax.numpy as jnp

from moe_jax.ops.balancing.common import Balancer, normalized_scores, token_mean
from moe_jax.ops.methods import require_option
from moe_jax.types import Array, BatchRouting

SCOPES = ("sequence", "group", "micro_batch", "buffer", "global_batch")


def units(routing: BatchRouting, scope: str) -> int:
  """Tokens in one of the units that `scope` balances over; B*L tokens in order are cut into such units."""
  return {"sequence": routing.mask_BL.shape[1], "group": routing.group_size}.get(scope, routing.mask_BL.size)


def all_choices(routing: BatchRouting) -> Array:
  """[B, L, E]: all K choices of a token (Switch with K = 1; 2401.06066 and 2501.11873 for K > 1)."""
  return routing.selected_BLE


def first_choice(routing: BatchRouting) -> Array:
  """[B, L, E]: only the highest-scoring expert counts (GShard, 2006.16668, Algorithm 1)."""
  best_BL = jnp.argmax(routing.log_scores_BLE, axis=-1)
  onehot_BLE = jax.nn.one_hot(best_BL, routing.logits_BLE.shape[-1], dtype=jnp.float32)
  return onehot_BLE * routing.mask_BL[..., None]


def _load_balancing(weight: float, scope: str, chosen) -> Balancer:
  """weight * E * sum_e(load_e * importance_e), load and importance taken over the units of `scope`.

  load_E has no gradient; importance_E is the mean of the sum-normalised scores. Units are weighted by
  their valid tokens. For `global_batch` the load is that of the whole optimizer step while importance
  stays local, so the mean over micro-batches equals the loss of the whole batch exactly. `buffer` is the
  one of 2501.11873: the load of the step's micro-batches up to this one, in one pass instead of two.
  """
  require_option("load-balancing loss", "scope", scope, SCOPES)

  def losses(state, routing, step_stats):
    num_experts = routing.logits_BLE.shape[-1]
    unit = units(routing, scope)
    mask_UT = routing.mask_BL.reshape(-1, unit).astype(jnp.float32)
    # where, not a product: padding may hold logits that give no number.
    probs_UTE = normalized_scores(routing).reshape(-1, unit, num_experts)
    probs_UTE = jnp.where(mask_UT[..., None] > 0, probs_UTE, 0)
    if scope == "global_batch":
      counts_UE = step_stats.whole[None]
    elif scope == "buffer":
      counts_UE = step_stats.so_far[None]
    else:
      counts_UE = chosen(routing).reshape(-1, unit, num_experts).sum(axis=1)
    counts_UE = jax.lax.stop_gradient(counts_UE)
    load_UE = counts_UE / jnp.maximum(counts_UE.sum(axis=-1, keepdims=True), 1.0)
    # sum over tokens, not their mean: it weighs each unit by its tokens, and an empty unit by nothing.
    importance_sum_UE = probs_UTE.sum(axis=1)
    loss = num_experts * jnp.sum(load_UE * importance_sum_UE) / jnp.maximum(mask_UT.sum(), 1.0)
    return {"load_balancing_loss": weight * loss}

  if scope not in ("buffer", "global_batch"):
    return Balancer(losses=losses, needs_sequences=scope == "sequence")
  count = lambda state, routing: chosen(routing).sum(axis=(0, 1))
  return Balancer(losses=losses, observe=count, needs_whole_step=scope == "global_batch")


def switch_loss(weight: float = 0.01, scope: str = "global_batch") -> Balancer:
  """Load-balancing loss over all K choices (2101.03961, eq. 4-6, with f divided by K)."""
  return _load_balancing(weight, scope, all_choices)


def gshard_loss(weight: float = 0.01, scope: str = "global_batch") -> Balancer:
  """Load-balancing loss over first choices (2006.16668, Algorithm 1), times E^2 so that balance is 1."""
  return _load_balancing(weight, scope, first_choice)


def z_loss(weight: float = 0.001) -> Balancer:
  """Router z-loss, the mean over tokens of logsumexp(logits)^2 (2202.08906, eq. 5)."""

  def losses(state, routing, step_stats):
    return {"z_loss": weight * token_mean(jax.nn.logsumexp(routing.logits_BLE, axis=-1) ** 2, routing)}

  return Balancer(losses=losses)
