"""The thresholds of Expert Threshold routing (2603.11535): a moving quantile of each expert's logits."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.ops.balancing.common import Balancer
from moe_jax.ops.balancing.quantile import bin_range, histogram, quantile, require_histogram_options
from moe_jax.types import Array, BatchRouting


class ThresholdState(NamedTuple):
  """A moving average that starts at 0, and how many steps are in it."""

  mean_E: Array  # float32
  steps: Array  # int32 scalar


class LogitCounts(NamedTuple):
  """The statistics of one step. They are sums over tokens, so the quantile does not depend on how the step is split."""

  count_EQ: Array  # float32, tokens per expert and bin of its logit
  num_choices: Array  # float32 scalar, K times the tokens


def expert_threshold(ema: float = 0.99, bins: int = 1000, reach: float = 8.0) -> Balancer:
  """Moves the thresholds of router `expert_threshold` (2603.11535), which needs it.

  Once per optimizer step, q_e is a logit of expert e that a share K/E of the step's tokens reach. It lies
  between the logits of the last token of that share and of the next one, at most a bin above the latter.
  The threshold is the moving average c_e <- ema * c_e + (1 - ema) * q_e from 0, divided by 1 - ema^steps,
  so the first step counts in full. It acts from the next step on, and its bias is -c_e. In evaluation it
  stands still.

  This is the authors' code (src/models/engines/common.py), with two differences. There, q_e is the mean
  over micro-batches and devices of their own k-th largest logits. Here, it is the quantile of the whole
  step, from a histogram that adds up, so it does not depend on how the step is cut. And the code first
  trains some steps with expert choice, in which thresholds only follow. Here there is no such warm-up,
  because those steps would leak the future: the first step has threshold 0, the second one that of the
  first step. The paper itself was not re-read.

  Args:
    ema: the share of the old average in the new one, in [0, 1). 0.99 in the released code.
    bins: bins per expert, uniform in [min(c) - reach, max(c) + reach]; values outside count in the end bins. The
      quantile is off by at most one bin width.
    reach: in units of the logits. Larger logits are found over several steps.

  State: `ThresholdState`. Statistics: `LogitCounts`. A step without tokens changes nothing.

  Raises:
    InputError: if an option is outside its range, or the router compares with no threshold.
  """
  require_histogram_options("expert_threshold", ema, bins, reach)

  def threshold(state: ThresholdState) -> Array:
    # Before the first step the average is 0, whatever it is divided by.
    steps = jnp.maximum(state.steps, 1).astype(jnp.float32)
    return state.mean_E / (1 - ema**steps)

  def observe(state: ThresholdState, routing: BatchRouting) -> LogitCounts:
    mask_T = routing.mask_BL.reshape(-1)
    logits_TE = routing.logits_BLE.reshape(mask_T.size, -1)
    count_EQ = histogram(logits_TE, mask_T, *bin_range(threshold(state), reach), bins)
    return LogitCounts(count_EQ, routing.num_experts_per_token * mask_T.sum().astype(jnp.float32))

  def update(state: ThresholdState, stats: LogitCounts) -> ThresholdState:
    below = stats.count_EQ[0].sum() - stats.num_choices / state.mean_E.size
    solved_E = quantile(stats.count_EQ, below, *bin_range(threshold(state), reach))
    some = stats.num_choices > 0
    return ThresholdState(
      jnp.where(some, ema * state.mean_E + (1 - ema) * solved_E, state.mean_E),
      state.steps + some.astype(jnp.int32),
    )

  return Balancer(
    init=lambda num_experts: ThresholdState(jnp.zeros(num_experts, jnp.float32), jnp.zeros((), jnp.int32)),
    bias=lambda state: -threshold(state),
    observe=observe,
    update=update,
    suits=_require_a_threshold,
  )


def _require_a_threshold(router: Any, num_further: int) -> None:
  del num_further
  if not router.has_threshold:
    raise InputError(
      "balancer expert_threshold: the router compares with no threshold; use router expert_threshold"
    )
