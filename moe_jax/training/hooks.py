"""What runs once per optimizer step, after the optimizer. `HOOKS` has all by name."""

from typing import Any

import jax
from flax import nnx

from moe_jax.errors import InputError
from moe_jax.nn.aux import update_balancers
from moe_jax.registry import Registry
from moe_jax.types import PyTree


class Hook:
  """The contract. A hook may change the model, and keeps a state of its own in checkpoints."""

  def init(self, model: nnx.Module) -> PyTree:
    """The hook's state before the first step, a tree of arrays."""
    del model
    return ()

  def __call__(self, model: nnx.Module, state: PyTree, aux: PyTree) -> PyTree:
    """Runs after an update.

    Args:
      model: with the new parameters. Changes to it stay.
      state: of this hook.
      aux: what the model's blocks know, summed over the micro-batches of the step.

    Returns:
      The hook's new state.
    """
    raise NotImplementedError


class BalancerUpdates(Hook):
  """Moves biases and other state of balancers, see `moe_jax.nn.aux.update_balancers`. Every step has it."""

  def __call__(self, model: nnx.Module, state: PyTree, aux: PyTree) -> PyTree:
    update_balancers(model, aux)
    return state


class AverageParameters(Hook):
  """An exponential average of the parameters: average <- decay * average + (1 - decay) * parameters."""

  def __init__(self, decay: float = 0.999):
    if not 0 <= decay < 1:
      raise InputError(f"hook average_parameters: decay must be in [0, 1), got {decay}")
    self.decay = decay

  def init(self, model: nnx.Module) -> PyTree:
    return jax.tree.map(lambda x: x + 0, nnx.state(model, nnx.Param))  # a copy: the step donates its state

  def __call__(self, model: nnx.Module, state: PyTree, aux: Any) -> PyTree:
    blend = lambda average, new: self.decay * average + (1 - self.decay) * new
    return jax.tree.map(blend, state, nnx.state(model, nnx.Param))


HOOKS = Registry("hook", {"average_parameters": AverageParameters})
