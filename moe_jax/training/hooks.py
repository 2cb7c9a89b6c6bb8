"""Hooks run once per optimizer step, after the optimizer. `HOOKS` has all of them by name."""

from typing import Any

import jax
from flax import nnx

from moe_jax.errors import InputError
from moe_jax.nn.aux import update_balancers
from moe_jax.registry import Registry
from moe_jax.types import PyTree


class Hook:
  """The base class of hooks. A hook may change the model, and may have a state, which checkpoints include."""

  def init(self, model: nnx.Module) -> PyTree:
    """Returns the state before the first step, a tree of arrays."""
    del model
    return ()

  def __call__(self, model: nnx.Module, state: PyTree, aux: PyTree) -> PyTree:
    """Runs after the update of an optimizer step.

    Args:
      model: the model with its new parameters. The hook may change it in place.
      state: the state of this hook.
      aux: the aux of the model, summed over the micro-batches of the step.

    Returns:
      The new state of this hook.
    """
    raise NotImplementedError


class BalancerUpdates(Hook):
  """Updates the state of balancers, see `moe_jax.nn.aux.update_balancers`.

  Every step runs it, before other hooks.
  """

  def __call__(self, model: nnx.Module, state: PyTree, aux: PyTree) -> PyTree:
    update_balancers(model, aux)
    return state


class AverageParameters(Hook):
  """Keeps an exponential average of the parameters: average <- decay * average + (1 - decay) * parameters.

  Raises:
    InputError: if `decay` is not in [0, 1).
  """

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
