"""Balancing without a loss: a bias per expert that affects only the choice of experts and changes every step.

After each optimizer step, the bias decreases for experts that received too many tokens and increases for experts
that received too few. The counts are those of the whole step before capacity. The new bias acts on the next step,
so no token's choice depends on later tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from moe_jax.errors import InputError, require_option
from moe_jax.ops.balancing.common import Balancer
from moe_jax.types import Array, BatchRouting, ExpertScale, PyTree

RULES = ("sign", "proportional", "rms")
SCHEDULES = ("constant", "stop", "linear", "cosine")
MIN_FACTOR = 1e-3


class ScheduledBias(NamedTuple):
  """The state of a bias whose rate changes. With a constant rate, the state is only the bias."""

  bias_E: Array  # float32
  step: Array  # int32, optimizer steps so far


def loss_free_bias(
  rate: float = 0.001,
  rule: str = "sign",
  schedule: str = "constant",
  steps: int = 0,
  centre: bool = False,
) -> Balancer:
  """Loss-free balancing (2408.15664, eq. 3 and Algorithm 1): b_e += rate * sign(mean(counts) - counts_e).

  Args:
    rate: how far a bias moves per optimizer step, in units of the score. After n steps of `sign`, |b_e| is at
      most n * rate.
    rule: how the error e = mean(counts) - counts_e becomes an update.
      sign: Algorithm 1.
      proportional: e / mean(counts), which is 1 for an expert without tokens. The paper has b_e += rate * e, on
        sigmoid scores in section 4.3 and on softmax scores in appendix C.2. Its rates do not fit an error in
        counts, and it does not state a divisor. Here the divisor is the mean, so that a rate means the same for
        every E, K and batch. The published rates do not transfer.
      rms: e / sqrt(mean(e^2)), as large as `sign` on average, but small errors cause small updates
        (kexue.fm/archives/10757).
    schedule, steps: how the rate changes over optimizer steps: `constant`; `stop`: 0 after `steps` of them
      (DeepSeek-V3, 2412.19437, section 4.2); `linear` and `cosine`: decays to 0 within `steps`.
    centre: whether to subtract the mean bias after every update, which keeps biases bounded and changes no choice.

  State: bias_E [E], or a `ScheduledBias`. Statistics: counts_E [E], tokens per expert before capacity.

  Raises:
    InputError: if the rate is negative, the rule or schedule is unknown, or `steps` does not fit the schedule.
  """
  move = _mover("loss_free_bias", rate, rule, schedule, steps)
  finish = (lambda bias_E: bias_E - bias_E.mean()) if centre else (lambda bias_E: bias_E)
  return _counting(0.0, schedule, lambda *args: finish(move(*args)), lambda bias_E: bias_E)


def multiplicative_bias(
  rate: float = 0.001, rule: str = "sign", schedule: str = "constant", steps: int = 0
) -> Balancer:
  """The multiplicative variant of loss-free balancing (2408.15664, eq. 5): the K best of score * b, b = 1 at first.

  b is updated as in `loss_free_bias`. It could reach 0, where an expert scores all tokens the same, so it is kept
  at `MIN_FACTOR` or more (our choice; the paper does not mention it). It cannot be combined with another bias.
  """
  move = _mover("multiplicative_bias", rate, rule, schedule, steps)
  return _counting(1.0, schedule, lambda *args: jnp.maximum(move(*args), MIN_FACTOR), ExpertScale)


def _counting(
  start: float,
  schedule: str,
  move: Callable[[Array, Array, Array | int], Array],
  as_bias: Callable[[Array], Array | ExpertScale],
) -> Balancer:
  """Returns a balancer with one number per expert, whose next value is `move(number_E, counts_E, step)`."""
  counted = schedule != "constant"

  def init(num_experts: int) -> PyTree:
    bias_E = jnp.full(num_experts, start, jnp.float32)
    return ScheduledBias(bias_E, jnp.zeros((), jnp.int32)) if counted else bias_E

  def count(state: PyTree, routing: BatchRouting) -> Array:
    return routing.selected_BLE.sum(axis=(0, 1))

  def update(state: PyTree, counts_E: Array) -> PyTree:
    if counted:
      return ScheduledBias(move(state.bias_E, counts_E, state.step), state.step + 1)
    return move(state, counts_E, 0)

  bias = lambda state: as_bias(state.bias_E if counted else state)
  return Balancer(init=init, bias=bias, observe=count, update=update)


def _mover(name: str, rate: float, rule: str, schedule: str, steps: int):
  """Returns the update rule: (bias_E, counts_E, step) -> bias_E after one step."""
  what = f"balancer {name}"
  require_option(what, "rule", rule, RULES)
  require_option(what, "schedule", schedule, SCHEDULES)
  if not rate >= 0:
    raise InputError(f"{what}: rate must be 0 or more, got {rate}")
  if schedule == "constant" and steps != 0:
    raise InputError(f"{what}: steps={steps} needs schedule={', '.join(SCHEDULES[1:])}, got constant")
  if schedule != "constant" and steps < 1:
    raise InputError(f"{what}: schedule={schedule} needs steps of 1 or more, got {steps}")
  return lambda bias_E, counts_E, step: (
    bias_E + rate * _share_of_rate(schedule, steps, step) * _error(rule, counts_E)
  )


def _error(rule: str, counts_E: Array) -> Array:
  """The error, positive for experts with too few tokens. It is exactly 0 at balance and if there are no tokens."""
  # Not mean - count: XLA divides by a constant E with a rounded reciprocal, so the error would not be 0 at balance.
  error_E = counts_E.sum() - counts_E.size * counts_E
  if rule == "sign":
    return jnp.sign(error_E)
  relative_E = error_E / jnp.maximum(counts_E.sum(), 1)
  if rule == "proportional":
    return relative_E
  rms = jnp.sqrt(jnp.mean(relative_E**2))
  return relative_E / jnp.where(rms > 0, rms, 1)


def _share_of_rate(schedule: str, steps: int, step: Array | int) -> Array | float:
  if schedule == "constant":
    return 1.0
  if schedule == "stop":
    return jnp.where(step < steps, 1.0, 0.0)
  left = 1 - jnp.minimum(step / steps, 1.0)
  return left if schedule == "linear" else 0.5 - 0.5 * jnp.cos(jnp.pi * left)
