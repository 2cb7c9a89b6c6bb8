"""Quantile balancing: solves for the bias that would have balanced the last step.

A token's cutoff is the score (with bias) that an expert must exceed to be chosen. The required bias of a token and
an expert is the cutoff minus the plain score; with that bias, the expert would be exactly at the cutoff. If an
expert's bias is the K/E quantile of its required biases, a share K/E of the tokens choose it, which is balance.

Sources: kexue.fm/archives/11619 (the article), and Kimi K3 (2607.24653), section 2.3.3 and appendix D (its eq. 14
takes quantiles of score - cutoff; appendix D takes quantiles of required biases, with the opposite sign).
The article iterates cutoffs and quantiles on one batch. For training, both the article and the report recommend one
round per step, starting from the bias of the previous step. This module does the same. The article sorts one batch.
Here, quantiles come from a histogram per expert, which can be summed over micro-batches and devices.
"""

from typing import NamedTuple

import jax.numpy as jnp

from moe_jax.errors import InputError, require_option
from moe_jax.ops.balancing.common import Balancer
from moe_jax.ops.routing.common import select_top_k, take_experts
from moe_jax.types import Array, BatchRouting

CUTOFFS = ("next", "quantile")


class RequiredBiases(NamedTuple):
  """The statistics of one step. They are sums over tokens, so the quantile does not depend on how the step is split."""

  count_EQ: Array  # float32, tokens per expert and bin of required bias
  num_choices: Array  # float32 scalar, K times the tokens


def quantile_balancing(
  ema: float = 0.0,
  bins: int = 1000,
  reach: float = 1.0,
  cutoff: str = "next",
  centre: bool = True,
) -> Balancer:
  """Quantile balancing as in Kimi K3. `centre=false` is the article's form; its program also has `cutoff=quantile`.

  Once per optimizer step, b_e becomes the K/E quantile over the step's tokens of cutoff_t - score_te, and then
  b <- b - mean(b). The new bias acts on the next step, so no token's choice depends on later tokens. There is no
  rate: the bias moves as far as necessary in one step.

  The quantile is that of the histogram, interpolated linearly within its bin. It is off by at most one bin width,
  (max(b) - min(b) + 2 * reach) / bins. Keep this small compared with the differences between scores. A softmax over
  many experts, with scores near 1/E, needs more bins or a shorter reach.

  Use this with routers that choose the K best of scores plus this bias. The cutoff does not account for noise,
  groups of experts, a varying number of experts, or a second balancer with a bias.

  Args:
    ema: the share of the old bias in the new one, in [0, 1).
    bins: bins per expert, uniform in [min(b) - reach, max(b) + reach]; values outside count in the end bins.
    reach: 1 is right for scores in [0, 1], because no value is then outside. With a shorter reach, or unbounded
      scores, a bias moves at most `reach` beyond the others per step, and needs several steps.
    cutoff: `next`, the (K+1)-th best score with bias; `quantile`, the 1 - K/E quantile of the token's scores
      with bias, which lies between the K-th and the (K+1)-th best. With K = E, both are the lowest score.
    centre: whether to subtract the mean bias, which changes no choice.

  State: bias_E [E] float32. Statistics: `RequiredBiases`. A step without tokens changes nothing.

  Raises:
    InputError: if an option is outside its range.
  """
  require_option("balancer quantile_balancing", "cutoff", cutoff, CUTOFFS)
  require_histogram_options("quantile_balancing", ema, bins, reach)

  def observe(bias_E: Array, routing: BatchRouting) -> RequiredBiases:
    scores_TE = routing.scores_BLE.reshape(-1, bias_E.size)
    mask_T = routing.mask_BL.reshape(-1)
    cutoff_T = _cutoff(scores_TE, bias_E, routing.num_experts_per_token, cutoff)
    count_EQ = histogram(cutoff_T[:, None] - scores_TE, mask_T, *bin_range(bias_E, reach), bins)
    return RequiredBiases(count_EQ, routing.num_experts_per_token * mask_T.sum().astype(jnp.float32))

  def update(bias_E: Array, stats: RequiredBiases) -> Array:
    solved_E = quantile(stats.count_EQ, stats.num_choices / bias_E.size, *bin_range(bias_E, reach))
    new_E = ema * bias_E + (1 - ema) * solved_E
    new_E = new_E - new_E.mean() if centre else new_E
    return jnp.where(stats.num_choices > 0, new_E, bias_E)

  return Balancer(
    init=lambda num_experts: jnp.zeros(num_experts, jnp.float32),
    bias=lambda bias_E: bias_E,
    observe=observe,
    update=update,
  )


def require_histogram_options(balancer: str, ema: float, bins: int, reach: float) -> None:
  """Raises `InputError` for options of a moving quantile that are outside their range."""
  for name, value, right, ok in (
    ("ema", ema, "in [0, 1)", 0 <= ema < 1),
    ("bins", bins, "1 or more", bins >= 1),
    ("reach", reach, "above 0", reach > 0),
  ):
    if not ok:
      raise InputError(f"balancer {balancer}: {name} must be {right}, got {value}")


def _cutoff(scores_TE: Array, bias_E: Array, k: int, cutoff: str) -> Array:
  """Returns the value that a score with bias must exceed to be among the K best, [T]."""
  num_experts = bias_E.size
  best_TX = take_experts(scores_TE + bias_E[None], select_top_k(scores_TE, bias_E, min(k + 1, num_experts)))
  if cutoff == "next" or k == num_experts:
    return best_TX[:, -1]
  # As in numpy's and JAX's quantile: position (1 - K/E) * (E - 1) from the lowest, interpolated between neighbours.
  return best_TX[:, -1] + k / num_experts * (best_TX[:, -2] - best_TX[:, -1])


def bin_range(values_E: Array, reach: float) -> tuple[Array, Array]:
  """Returns the lower and the upper end of the bins: `reach` beyond the smallest and the largest value."""
  return values_E.min() - reach, values_E.max() + reach


def histogram(values_TE: Array, mask_T: Array, low: Array, high: Array, bins: int) -> Array:
  """Returns valid tokens per uniform bin of [low, high], [E, Q] float32. Values outside count in the end bins."""
  num_experts = values_TE.shape[-1]
  bin_TE = jnp.clip(jnp.floor((values_TE - low) * bins / (high - low)), 0, bins - 1).astype(jnp.int32)
  # On CPU, one scatter into a flat array is 3 times as fast as one per expert, and 100 times as one-hot products.
  flat_TE = bins * jnp.arange(num_experts)[None] + bin_TE
  # Padding may hold any value and fall into any bin, or none. It counts 0.
  valid_TE = jnp.broadcast_to(mask_T[:, None], flat_TE.shape).astype(jnp.float32)
  return jnp.zeros(num_experts * bins, jnp.float32).at[flat_TE].add(valid_TE).reshape(num_experts, bins)


def quantile(count_EQ: Array, rank: Array, low: Array, high: Array) -> Array:
  """Returns the value below which `rank` of an expert's tokens lie, [E], interpolated linearly within its bin."""
  num_experts, bins = count_EQ.shape
  # Counts differ from rank by multiples of 1/E, so half of that is a safe margin for rounding errors in rank.
  reached_EQ = jnp.cumsum(count_EQ, axis=-1) > rank - 0.5 / num_experts
  bin_E = jnp.argmax(reached_EQ, axis=-1)
  below_E = jnp.sum(jnp.where(reached_EQ, 0, count_EQ), axis=-1)
  inside_E = jnp.take_along_axis(count_EQ, bin_E[:, None], axis=-1)[:, 0]
  fraction_E = jnp.clip((rank - below_E) / jnp.maximum(inside_E, 1), 0, 1)
  return low + (bin_E + fraction_E) * (high - low) / bins
