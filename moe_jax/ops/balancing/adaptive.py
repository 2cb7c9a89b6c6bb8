"""A load-balancing loss whose weight adapts to the number of assignments over capacity."""

import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.ops.balancing.common import Balancer
from moe_jax.ops.balancing.losses import switch_loss
from moe_jax.ops.dispatch.capacity import expert_capacity
from moe_jax.types import Array, BatchRouting, StepStats


def over_capacity(routing: BatchRouting, capacity_factor: float) -> Array:
  """Returns the number of assignments that exceed the capacity of their expert in their group."""
  num_experts = routing.logits_BLE.shape[-1]
  size = routing.group_size
  capacity = expert_capacity(size, routing.num_experts_per_token, capacity_factor, num_experts)
  counts_GE = routing.selected_BLE.reshape(-1, size, num_experts).sum(axis=1)
  return jnp.sum(jnp.maximum(counts_GE - capacity, 0.0))


def adaptive_loss(
  weight: float = 0.01,
  max_ratio: float = 0.01,
  min_ratio: float = 0.001,
  rate: float = 0.01,
  average: float = 0.01,
  capacity_factor: float = 1.25,
  limit: float = 1000.0,
  scope: str = "global_batch",
) -> Balancer:
  """`switch_loss` times a scale that keeps the over-capacity ratio between `min_ratio` and `max_ratio`.

  The rule is that of axlearn (apple/axlearn:axlearn/common/mixture_of_experts.py, AdaptiveLoadBalanceLoss). It is
  applied per layer, once per optimizer step n = 1, 2, ...: with a = max(`average`, 1/n),
    mean <- (1 - a) * mean + a * ratio,
    log(scale) <- log(scale) + rate * ((mean > max_ratio) - (mean < min_ratio)), starting at 0.
  The ratio is the number of assignments above ceil(capacity_factor * T * K / E) per expert and group, divided by
  all assignments of the step. With the layer's capacity factor, this is its dropped fraction.

  Like axlearn's TopKGating, this has one ratio over all choices, and a loss over all choices divided by K.
  (axlearn's Top2Gating takes the larger of the ratios of first and second choices, and its loss counts first
  choices.) Two things differ. axlearn's new scale acts in the same step; ours acts in the next. Its scale is
  unbounded; ours stays in [1/limit, limit], so that it does not diverge if the ratio cannot be reached. axlearn
  has defaults only for min_ratio and rate, which we use; the other defaults are our choice.
  """
  for name, value, right, want in (
    ("min_ratio", min_ratio, 0 <= min_ratio <= max_ratio, f"in [0, max_ratio={max_ratio}]"),
    ("rate", rate, rate >= 0, "0 or more"),
    ("average", average, 0 < average <= 1, "in (0, 1]"),
    ("capacity_factor", capacity_factor, capacity_factor > 0, "above 0"),
    ("limit", limit, limit >= 1, "1 or more"),
  ):
    if not right:
      raise InputError(f"balancer adaptive_loss: {name} must be {want}, got {value}")
  fixed = switch_loss(weight, scope)

  def init(num_experts: int):
    return {"log_scale": jnp.float32(0), "mean_ratio": jnp.float32(0), "num_steps": jnp.int32(0)}

  def observe(state, routing):
    return {
      "load": fixed.observe((), routing),
      "over": over_capacity(routing, capacity_factor),
      "all": routing.selected_BLE.sum(),
    }

  def losses(state, routing, step_stats):
    of_load = StepStats(step_stats.whole["load"], step_stats.so_far["load"])
    (loss,) = fixed.losses((), routing, of_load).values()
    return {"load_balancing_loss": jnp.exp(state["log_scale"]) * loss}

  def update(state, stats):
    num_steps = state["num_steps"] + 1
    share = jnp.maximum(average, 1 / num_steps)
    ratio = stats["over"] / jnp.maximum(stats["all"], 1.0)
    mean_ratio = (1 - share) * state["mean_ratio"] + share * ratio
    direction = (mean_ratio > max_ratio).astype(jnp.float32) - (mean_ratio < min_ratio)
    bound = jnp.log(jnp.float32(limit))
    log_scale = jnp.clip(state["log_scale"] + rate * direction, -bound, bound)
    return {"log_scale": log_scale, "mean_ratio": mean_ratio, "num_steps": num_steps}

  return fixed._replace(init=init, losses=losses, observe=observe, update=update)
