"""Losses that are added to the language-model loss. Each equals weight x 1 at perfect balance."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.ops.balancing.common import Balancer, normalized_scores, token_mean
from moe_jax.types import Array, BatchRouting, PyTree

SCOPES = ("sequence", "group", "micro_batch", "buffer", "global_batch")


def units(routing: BatchRouting, scope: str) -> int:
  """Returns the number of tokens in each unit that `scope` balances over. B*L tokens are split into units in order."""
  return {"sequence": routing.mask_BL.shape[1], "group": routing.group_size}.get(scope, routing.mask_BL.size)


def all_choices(routing: BatchRouting) -> Array:
  """[B, L, E]: all K choices of a token (Switch with K = 1; 2401.06066 and 2501.11873 for K > 1)."""
  return routing.selected_BLE


def first_choice(routing: BatchRouting) -> Array:
  """[B, L, E]: only the highest-scoring expert counts (GShard, 2006.16668, Algorithm 1)."""
  best_BL = jnp.argmax(routing.log_scores_BLE, axis=-1)
  onehot_BLE = jax.nn.one_hot(best_BL, routing.logits_BLE.shape[-1], dtype=jnp.float32)
  return onehot_BLE * routing.mask_BL[..., None]


def fractions(counts_UE: Array) -> Array:
  """[U, E]: each expert's share of the counts of its unit."""
  return counts_UE / jnp.maximum(counts_UE.sum(axis=-1, keepdims=True), 1.0)


def load_balancing(
  weight: float,
  scope: str,
  count: Callable[[BatchRouting], PyTree],
  load: Callable[[PyTree], Array] = fractions,
  importance: Callable[[BatchRouting], Array] = normalized_scores,
) -> Balancer:
  """Returns weight * X * sum_x(load_x * importance_x), with load and importance over the units of `scope`.

  The X axis is experts, or the parts that they are cut into. load_X has no gradient; importance_X is a mean over
  valid tokens. Units are weighted by their valid tokens. For `global_batch`, the load is that of the whole optimizer
  step while the importance stays local, so the mean over micro-batches equals the loss of the whole batch exactly.
  `buffer` is that of 2501.11873: it uses the load of the step's micro-batches up to this one, and needs one pass
  instead of two.

  Args:
    count: routing -> a tree of [B, L, ...], what each token adds to the load; 0 at padding.
    load: the sums of these counts over units, [U, ...] -> load_UX, each 1/X at balance.
    importance: routing -> [B, L, X], differentiable; padding may hold any value.
  """
  if scope not in SCOPES:  # who makes the balancer adds its name
    raise InputError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")

  def losses(state, routing, step_stats):
    unit = units(routing, scope)
    mask_UT = routing.mask_BL.reshape(-1, unit).astype(jnp.float32)
    probs_BLX = importance(routing)
    # where instead of a product, because logits at padding may produce NaN.
    probs_BLX = jnp.where(routing.mask_BL[..., None], probs_BLX, 0)
    if scope == "global_batch":
      sums = jax.tree.map(lambda x: x[None], step_stats.whole)
    elif scope == "buffer":
      sums = jax.tree.map(lambda x: x[None], step_stats.so_far)
    else:
      sums = jax.tree.map(lambda x: x.reshape(-1, unit, *x.shape[2:]).sum(axis=1), count(routing))
    load_UX = load(jax.lax.stop_gradient(sums))
    # A sum over tokens instead of a mean, so that each unit is weighted by its tokens and an empty unit by 0.
    importance_sum_UX = probs_BLX.reshape(-1, unit, probs_BLX.shape[-1]).sum(axis=1)
    loss = probs_BLX.shape[-1] * jnp.sum(load_UX * importance_sum_UX) / jnp.maximum(mask_UT.sum(), 1.0)
    return {"load_balancing_loss": weight * loss}

  if scope not in ("buffer", "global_batch"):
    return Balancer(losses=losses, needs_sequences=scope == "sequence")
  observe = lambda state, routing: jax.tree.map(lambda x: x.sum(axis=(0, 1)), count(routing))
  return Balancer(losses=losses, observe=observe, needs_whole_step=scope == "global_batch")


def switch_loss(weight: float = 0.01, scope: str = "global_batch") -> Balancer:
  """Load-balancing loss over all K choices (2101.03961, eq. 4-6, with f divided by K)."""
  return load_balancing(weight, scope, all_choices)


def gshard_loss(weight: float = 0.01, scope: str = "global_batch") -> Balancer:
  """Load-balancing loss over first choices (2006.16668, Algorithm 1), times E^2 so that balance is 1."""
  return load_balancing(weight, scope, first_choice)


def st_moe_loss(weight: float = 0.01, scope: str = "group") -> Balancer:
  """ST-MoE's load-balancing loss (2202.08906): GShard's loss over first choices, even for K > 1, per group.

  ST-MoE was trained with Mesh-TensorFlow, which counts first choices only (mesh_tensorflow/transformer/moe.py).
  flaxformer counts all K choices and does not divide by K, which is K times `switch_loss:scope=group`. There,
  padding counts as tokens; here it does not.
  """
  return load_balancing(weight, scope, first_choice)


def z_loss(weight: float = 0.001) -> Balancer:
  """Router z-loss, the mean over tokens of logsumexp(logits)^2 (2202.08906, eq. 5)."""

  def losses(state, routing, step_stats):
    return {"z_loss": weight * token_mean(jax.nn.logsumexp(routing.logits_BLE, axis=-1) ** 2, routing)}

  return Balancer(losses=losses)
