"""Balancing with the coefficient of variation (CV) over experts: standard deviation / mean.

CV^2 is 0 at perfect balance, where the load-balancing losses of `losses.py` are 1. It is E / K - 1 if all tokens
give the same K experts equal weights. A weight here therefore does not mean the same as a weight there.

The variance is that of the E experts themselves (divided by E, not E - 1), and the quotient has no epsilon.
Tensor2Tensor adds 1e-10 to the squared mean. With that epsilon, shrinking all weights together lowers the loss.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError, require_option
from moe_jax.ops.balancing.common import Balancer, normalized_scores
from moe_jax.ops.balancing.losses import SCOPES, units
from moe_jax.types import Array, BatchRouting


def cv_squared(values_UE: Array) -> Array:
  """Returns the squared coefficient of variation over experts, [U]. It is 0 if all are 0, and scale-invariant."""
  num_experts = values_UE.shape[-1]
  total_U1 = values_UE.sum(axis=-1, keepdims=True)
  relative_UE = num_experts * values_UE / jnp.where(total_U1 > 0, total_U1, 1)
  return jnp.where(total_U1[:, 0] > 0, jnp.mean((relative_UE - 1) ** 2, axis=-1), 0)


def _balance(
  weight: float, scope: str, name: str, values_of, suits=lambda router, num_further: None
) -> Balancer:
  """Returns weight * CV^2 of the mean over tokens of `values_of(routing)` [B, L, E], per unit of `scope`.

  Units are weighted by their valid tokens. Over the whole step (`global_batch`), the loss is f(m), where m is the
  mean over all its tokens. A micro-batch has a gradient only for its own part of m. Each micro-batch therefore uses
  the value f(m) and the gradient f'(m) d(its own mean). Weighted by shares of tokens, these sum to f(m) and its
  exact gradient. `buffer` does the same with the mean over the micro-batches so far.
  """
  require_option(f"balancer {name}", "scope", scope, SCOPES)

  def tokens_and_sums(routing: BatchRouting, unit: int) -> tuple[Array, Array]:
    mask_UT = routing.mask_BL.reshape(-1, unit)
    values_UTE = values_of(routing).reshape(-1, unit, routing.logits_BLE.shape[-1])
    # where instead of a product, because padding may hold NaN.
    return mask_UT.sum(axis=1).astype(jnp.float32), jnp.where(mask_UT[..., None], values_UTE, 0).sum(axis=1)

  def mean(tokens_U: Array, sums_UE: Array) -> Array:
    return sums_UE / jnp.maximum(tokens_U, 1)[:, None]

  def losses(state, routing, step_stats):
    tokens_U, sums_UE = tokens_and_sums(routing, units(routing, scope))
    mean_UE = mean(tokens_U, sums_UE)
    if scope in ("buffer", "global_batch"):
      of_step = step_stats.whole if scope == "global_batch" else step_stats.so_far
      tokens, sum_E = of_step
      step_mean_UE = mean(tokens[None], sum_E[None])
      mean_UE = jax.lax.stop_gradient(step_mean_UE - mean_UE) + mean_UE
      return {name: weight * cv_squared(mean_UE)[0]}
    return {name: weight * jnp.sum(tokens_U * cv_squared(mean_UE)) / jnp.maximum(tokens_U.sum(), 1)}

  if scope not in ("buffer", "global_batch"):
    return Balancer(losses=losses, needs_sequences=scope == "sequence", suits=suits)

  def observe(state, routing):
    tokens_U, sums_UE = tokens_and_sums(routing, routing.mask_BL.size)
    return tokens_U[0], sums_UE[0]

  return Balancer(
    losses=losses,
    observe=observe,
    needs_whole_step=scope == "global_batch",
    suits=suits,
  )


def importance_loss(weight: float = 0.1, scope: str = "global_batch", of: str = "weights") -> Balancer:
  """weight * CV(importance)^2, where importance_e is a sum over tokens (1701.06538, eq. 6-7).

  of: `weights` sums the combine weights of the chosen experts, as the paper does. `scores` sums the scores of all
    experts divided by their sum, as V-MoE does (2106.05974, appendix A).
  """
  require_option("balancer importance_loss", "of", of, ("weights", "scores"))
  values_of = normalized_scores if of == "scores" else lambda routing: routing.weights_BLE
  return _balance(weight, scope, "importance_loss", values_of)


def load_loss(weight: float = 0.1, scope: str = "global_batch") -> Balancer:
  """weight * CV(load)^2, where load_e is the sum over tokens of the smooth load (1701.06538, eq. 10-11).

  It needs a router that computes the smooth load: `noisy_topk`, `vmoe_topk` or `hierarchical_topk`.
  """
  return _balance(weight, scope, "load_loss", lambda routing: routing.smooth_load_BLE, _needs_smooth_load)


def _needs_smooth_load(router: Any, num_further: int) -> None:
  if not router.gives_smooth_load:
    raise InputError(
      "balancer load_loss: reads the smooth load, which this router does not give; use router noisy_topk"
    )
