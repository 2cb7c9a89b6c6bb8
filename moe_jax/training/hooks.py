"""Hooks run once per optimizer step, after the optimizer. `HOOKS` has all of them by name."""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import InputError
from moe_jax.fingerprint import is_builtin, place
from moe_jax.nn.aux import mixer_auxes, update_balancers
from moe_jax.registry import Method, Registry
from moe_jax.training.own_steps import check_new_state, check_same, naming_errors
from moe_jax.types import PyTree


class Hook:
  """The base class of hooks. A hook may change the model, and may have a state, which checkpoints include.

  reads_scores: whether aux must have the largest attention scores of the step, see `moe_jax.types.MixerAux`.
  """

  reads_scores: bool = False

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
      The new state of this hook, with the structure, shapes and types of what `init` returns.
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


class QKClip(Hook):
  """QK-clip of MuonClip (Kimi K2, 2507.20534, section 2.1): limits the attention scores of each head to about `tau`.

  If the largest score S of a head in the step's forward pass exceeds tau, its queries and keys are scaled so that
  all its scores are multiplied by tau / S: for plain attention the matrices of both by the square root, for latent
  attention as in `moe_jax.nn.mixers.mla.MLA.scale_scores`. Mixers without scores, such as lightning attention, stay
  as they are. Only the parameters change, and not the state of the optimizer.

  Raises:
    InputError: if `tau` is not above 0, the queries or keys of an attention are normalised or clipped, or parameters
      of it are frozen, as they are under low-rank adapters.
  """

  reads_scores = True

  def __init__(self, tau: float = 100.0):
    if not tau > 0:
      raise InputError(f"hook qk_clip: tau must be above 0, got {tau}")
    self.tau = tau

  def init(self, model: nnx.Module) -> PyTree:
    mixers = self._mixers(model)
    if not mixers:
      raise InputError("hook qk_clip: no mixer of the model has attention scores")
    if not all(mixer.scores_scale for mixer in mixers):
      raise InputError(
        "hook qk_clip: a mixer normalises or clips queries and keys (qk_norm, clip_qkv), which limits its scores by "
        "other means; leave out one of the two"
      )
    if any(_has_frozen(mixer) for mixer in mixers):
      raise InputError(
        "hook qk_clip: scales queries and keys of every mixer, and one has frozen parameters (low_rank, --trained); "
        "leave out one of the two"
      )
    return ()

  def __call__(self, model: nnx.Module, state: PyTree, aux: PyTree) -> PyTree:
    for mixer, own in zip(self._mixers(model), mixer_auxes(aux), strict=True):
      largest_N = own.largest_score_N.value
      mixer.scale_scores(jnp.where(largest_N > self.tau, self.tau / largest_N, 1.0))
    return state

  def _mixers(self, model: nnx.Module) -> list[Any]:
    """Those with scores, in the order in which flax walks the model, which is that of its aux."""
    return [module for _, module in nnx.iter_modules(model) if hasattr(module, "scale_scores")]


def _has_frozen(module: nnx.Module) -> bool:
  params = jax.tree.leaves(nnx.state(module, nnx.Param), is_leaf=lambda x: isinstance(x, nnx.Variable))
  return any(param.get_metadata().get("group") == "frozen" for param in params)


HOOKS = Registry("hook", {"average_parameters": AverageParameters, "qk_clip": QKClip})


def make_hooks(methods: Sequence[Method]) -> tuple[Hook, ...]:
  """Returns the hooks that the methods make. Raises `InputError` if one is no `Hook`."""
  hooks = tuple(method() for method in methods)
  for method, hook in zip(methods, hooks, strict=True):
    if not isinstance(hook, Hook):
      raise InputError(
        f"hook {method.name} ({place(method.factory)}): makes a {type(hook).__name__}, which is no Hook"
      )
  return hooks


def init_hooks(model: nnx.Module, hooks: Sequence[Hook]) -> tuple[PyTree, ...]:
  """Returns the state of each hook before the first step.

  Raises:
    InputError: if a hook of a user's own fails, or its state has a typed random key.
  """
  states = []
  for hook in hooks:
    with _naming_errors(hook):
      states.append(hook.init(model))
    check_new_state(_name(hook), states[-1])
  return tuple(states)


def run_hooks(
  model: nnx.Module, hooks: Sequence[Hook], states: tuple[PyTree, ...], aux: PyTree
) -> tuple[PyTree, ...]:
  """Runs the updates of balancers and then all hooks, which may change `model`. Returns the new states.

  Raises:
    InputError: if a hook of a user's own fails, or one changes the structure, shapes or types of its state or of the
      variables of the model.
  """
  BalancerUpdates()(model, (), aux)
  after = []
  for hook, state in zip(hooks, states, strict=True):
    before = jax.tree.map(
      lambda leaf: leaf, nnx.state(model)
    )  # a copy: the hook may change the model in place
    with _naming_errors(hook):
      after.append(hook(model, state, aux))
    check_same(_name(hook), "its state", state, after[-1])
    check_same(_name(hook), "the model's", before, nnx.state(model))
  return tuple(after)


def _name(hook: Hook) -> str:
  return f"hook {type(hook).__name__}"


def _naming_errors(hook: Hook) -> contextlib.AbstractContextManager[None]:
  own = not is_builtin(type(hook))
  return naming_errors(_name(hook), type(hook)) if own else contextlib.nullcontext()
