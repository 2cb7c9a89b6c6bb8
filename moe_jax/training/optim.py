"""The optimizer: clipping, AdamW (1711.05101), and a schedule with warm-up, all from optax."""

import jax
import optax
from flax import nnx

from moe_jax.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
  """Linear warm-up to `learning_rate`, then the chosen decay, ending at the last step.

  A run shorter than its warm-up still decays: warm-up takes at most half of the steps.
  """
  peak, end = config.learning_rate, config.learning_rate * config.final_learning_rate_fraction
  warmup = min(config.warmup_steps, num_steps // 2)
  rest = max(num_steps - warmup, 1)
  decay = {
    "constant": optax.constant_schedule(peak),
    "linear": optax.linear_schedule(peak, end, rest),
    "cosine": optax.cosine_decay_schedule(peak, rest, alpha=config.final_learning_rate_fraction),
  }[config.schedule]
  # Warm-up counts from 1/warmup, so that the first step already moves.
  rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
  return optax.join_schedules([rise, decay], [warmup])


def is_matrix(params: nnx.State) -> nnx.State:
  """True for variables with two or more logical axes, not counting the stacked layers: those decay."""
  return jax.tree.map(
    lambda v: v.replace(len(v.get_metadata()["logical_axes"]) >= 2),
    params,
    is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
  )


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
  """The chain of global-norm clipping and AdamW."""
  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity()
  adamw = optax.adamw(
    learning_rate_schedule(config, num_steps),
    b1=config.beta1,
    b2=config.beta2,
    weight_decay=config.weight_decay,
    mask=is_matrix,
  )
  return optax.chain(clip, adamw)
