"""Losses that are added to the language-model loss. Each is weight x 1 at perfect balance."""

import jax
import jax.numpy as jnp

from moe_jax.ops.balancing.common import Balancer
from moe_jax.ops.methods import require_option
from moe_jax.types import Array, BatchRouting

SCOPES = ("sequence", "group", "micro_batch", "global_batch")
_TINY = jnp.finfo(jnp.float32).tiny


def normalized_scores(scores: Array) -> Array:
  """Scores [..., E] divided by their sum over E. The floor is the smallest normal float32, applied per
  score: an epsilon added to the sum would let a router shrink its scores to escape the loss."""
  scores = jnp.maximum(scores, _TINY)
  # A constant factor changes neither value nor gradient, but the gradient divides by the square of the
  # sum, which underflows to 0/0 for sigmoid scores below 1e-19.
  scores = scores / jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
  return scores / scores.sum(axis=-1, keepdims=True)


def all_choices(routing: BatchRouting) -> Array:
  """[B, L, E]: all K choices of a token (Switch with K = 1; 2401.06066 and 2501.11873 for K > 1)."""
  return routing.selected_BLE


def first_choice(routing: BatchRouting) -> Array:
  """[B, L, E]: only the highest-scoring expert counts (GShard, 2006.16668, Algorithm 1)."""
  best_BL = jnp.argmax(routing.scores_BLE, axis=-1)
  onehot_BLE = jax.nn.one_hot(best_BL, routing.scores_BLE.shape[-1], dtype=jnp.float32)
  return onehot_BLE * routing.mask_BL[..., None]


def _load_balancing(weight: float, scope: str, chosen) -> Balancer:
  """weight * E * sum_e(load_e * importance_e), load and importance taken over the units of `scope`.

  load_E has no gradient; importance_E is the mean of the sum-normalised scores. Units are weighted by
  their valid tokens. For `global_batch` the load is that of the whole optimizer step while importance
  stays local, so the mean over micro-batches equals the loss of the whole batch exactly.
  """
  require_option("load-balancing loss", "scope", scope, SCOPES)

  def losses(state, routing, step_stats):
    num_experts = routing.scores_BLE.shape[-1]
    unit = {
      "sequence": routing.mask_BL.shape[1],
      "group": routing.group_size,
      "micro_batch": routing.mask_BL.size,
      "global_batch": routing.mask_BL.size,
    }[scope]
    mask_UT = routing.mask_BL.reshape(-1, unit).astype(jnp.float32)
    probs_UTE = normalized_scores(routing.scores_BLE).reshape(-1, unit, num_experts) * mask_UT[..., None]
    if scope == "global_batch":
      counts_UE = step_stats[None]
    else:
      counts_UE = chosen(routing).reshape(-1, unit, num_experts).sum(axis=1)
    counts_UE = jax.lax.stop_gradient(counts_UE)
    load_UE = counts_UE / jnp.maximum(counts_UE.sum(axis=-1, keepdims=True), 1.0)
    # sum over tokens, not their mean: it weighs each unit by its tokens, and an empty unit by nothing.
    importance_sum_UE = probs_UTE.sum(axis=1)
    loss = num_experts * jnp.sum(load_UE * importance_sum_UE) / jnp.maximum(mask_UT.sum(), 1.0)
    return {"load_balancing_loss": weight * loss}

  if scope != "global_batch":
    return Balancer(losses=losses)
  return Balancer(
    losses=losses, observe=lambda routing: chosen(routing).sum(axis=(0, 1)), needs_step_stats=True
  )


def switch_loss(weight: float = 0.01, scope: str = "global_batch") -> Balancer:
  """Load-balancing loss over all K choices (2101.03961, eq. 4-6, with f divided by K)."""
  return _load_balancing(weight, scope, all_choices)


def gshard_loss(weight: float = 0.01, scope: str = "global_batch") -> Balancer:
  """Load-balancing loss over first choices (2006.16668, Algorithm 1), times E^2 so that balance is 1."""
  return _load_balancing(weight, scope, first_choice)


def z_loss(weight: float = 0.001) -> Balancer:
  """Router z-loss, the mean over tokens of logsumexp(logits)^2 (2202.08906, eq. 5)."""

  def losses(state, routing, step_stats):
    z_BL = jax.nn.logsumexp(routing.logits_BLE, axis=-1) ** 2
    # where, not a product: the square of a large logit of padding is infinite, and inf * 0 is no number.
    z_sum = jnp.sum(jnp.where(routing.mask_BL, z_BL, 0))
    return {"z_loss": weight * z_sum / jnp.maximum(routing.mask_BL.sum(), 1)}

  return Balancer(losses=losses)
