"""The optimizer: clipping, groups of parameters, and a schedule with warm-up.

All of them are optax transformations.

The metadata `group` of a parameter names its group. A parameter without it is trained by the configured
optimizer. The group "frozen" is not changed (see `moe_jax.nn.variables.freeze`).
"""

import jax.numpy as jnp
import optax
from flax import nnx

from moe_jax.config import OptimizerConfig
from moe_jax.nn.variables import per_variable
from moe_jax.registry import Registry
from moe_jax.training.muon import scale_by_muon
from moe_jax.training.own_steps import checked

FROZEN = "frozen"


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
  """Returns a linear warm-up to `learning_rate`, followed by the chosen decay.

  The decay reaches its final fraction at the end of the last step.
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


def is_frozen(variable: nnx.Variable) -> bool:
  return variable.get_metadata().get("group") == FROZEN


def _decays(variable: nnx.Variable) -> bool:
  """Matrices have two or more logical axes, not counting that of stacked layers. A bias may too, as of experts."""
  metadata = variable.get_metadata()
  return len(metadata["logical_axes"]) >= 2 and metadata.get("decays", True)


is_matrix = per_variable(_decays)


def adamw(
  learning_rate: optax.Schedule, weight_decay: float, beta1: float, beta2: float
) -> optax.GradientTransformation:
  """Returns AdamW (1711.05101). Matrices decay. Norms, biases and other vectors do not."""
  return optax.adamw(learning_rate, b1=beta1, b2=beta2, weight_decay=weight_decay, mask=is_matrix)


def muon(
  learning_rate: optax.Schedule, weight_decay: float, beta1: float, beta2: float, *, momentum: float = 0.95
) -> optax.GradientTransformation:
  """Returns Muon for the matrices of hidden layers, and AdamW for all other parameters, as in Kimi K2 (2507.20534).

  Both have the same learning rate and weight decay: Muon's update has the root mean square of a typical one of AdamW
  (2502.16982). As with `adamw`, vectors do not decay.

  Args:
    learning_rate: of both.
    weight_decay: of all matrices.
    beta1, beta2: of AdamW.
    momentum: of Muon.
  """
  return optax.chain(
    scale_by_muon(momentum, otherwise=optax.scale_by_adam(b1=beta1, b2=beta2)),
    optax.add_decayed_weights(weight_decay, mask=is_matrix),
    optax.scale_by_learning_rate(learning_rate),
  )


OPTIMIZERS = Registry(
  "optimizer",
  {"adamw": adamw, "muon": muon},
  offered=("learning_rate", "weight_decay", "beta1", "beta2"),
)


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
  """Returns the optimizer, after clipping of the global norm.

  Frozen parameters do not count in the norm and have no state.

  Args:
    config: names the optimizer and its hyperparameters.
    num_steps: the number of optimizer steps, for the schedule.

  Raises:
    InputError: if an optimizer of a user's own is none, see `moe_jax.training.own_steps.checked`.
  """
  method = OPTIMIZERS.resolve(config.optimizer)
  optimizer = method(
    learning_rate=learning_rate_schedule(config, num_steps),
    weight_decay=config.weight_decay,
    beta1=config.beta1,
    beta2=config.beta2,
  )
  if method.source:  # a user's; tests check those of this package
    optimizer = checked(method.name, method.factory, optimizer)
  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity()
  label = per_variable(lambda v: FROZEN if is_frozen(v) else "trained")
  groups = {"trained": optax.chain(clip, optimizer), FROZEN: optax.set_to_zero()}
  return optax.partition(groups, label)


def trained(gradients: nnx.State) -> nnx.State:
  """Returns the gradients, with zeros for frozen parameters. The compiler then does not compute those."""
  value = lambda v: jnp.zeros_like(v.get_value()) if is_frozen(v) else v.get_value()
  return per_variable(value)(gradients)
