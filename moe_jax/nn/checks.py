"""Checks that the parts of an MoE layer fit together and keep their promises, before anything is compiled."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import InputError, require_option
from moe_jax.nn.routers import Router
from moe_jax.ops.balancing import Balancer
from moe_jax.types import (
  Array,
  Assignment,
  BatchRouting,
  ExpertOutputs,
  ExpertScale,
  PyTree,
  Routing,
  StepStats,
)


def check_sizes(num_experts: int, num_experts_per_token: int, expert_dim: int, group_size: int) -> None:
  """Raises `InputError` unless a token can be sent to that many experts, of that width, in groups of that size."""
  if not 1 <= num_experts_per_token <= num_experts:
    raise InputError(
      f"num_experts_per_token={num_experts_per_token}: must be between 1 and num_experts={num_experts}"
    )
  if expert_dim < 1:
    raise InputError(f"expert_dim={expert_dim}: must be at least 1")
  if group_size < 0:
    raise InputError(f"group_size={group_size}: tokens per group, or 0 to choose from the shape")


def check_factors(
  capacity_factor: float, eval_capacity_factor: float, jitter: float, init_scale: float
) -> None:
  """Raises `InputError` unless experts have slots, the jitter keeps the sign of what it multiplies, and weights can be drawn."""
  for name, value in (("capacity_factor", capacity_factor), ("eval_capacity_factor", eval_capacity_factor)):
    if not (math.isfinite(value) and value > 0):
      raise InputError(f"{name}={value}: must be a finite number above 0, e.g. 1.25")
  if not 0 <= jitter < 1:
    raise InputError(f"jitter={jitter}: must be in [0, 1)")
  if not (math.isfinite(init_scale) and init_scale > 0):
    raise InputError(f"init_scale={init_scale}: must be a finite number above 0; Switch uses 0.1")


def check_fit(router: Router, balancer: Balancer, num_experts: int) -> None:
  """Raises `InputError` if the balancer needs something that the router does not provide.

  E is `num_experts`.
  """
  require_option("the router", "weighs", router.weighs, ("output", "input"))
  num_scored_experts = router.num_scored_experts or num_experts
  bias = balancer.bias(balancer.init(num_scored_experts))
  if bias is not None and not router.takes_bias:
    raise InputError(
      "the balancer moves the choice by a bias, and the router takes none; use a loss, or no balancer"
    )
  balancer.suits(router, num_scored_experts - num_experts)


def check_flat(router: Router, balancer: Balancer) -> None:
  """Raises `InputError` if the router or balancer needs sequences. Called if the layer gets flat tokens."""
  wrong = "the layer was given flat tokens x_TD; give it x_BLD"
  if router.whole_sequences:
    raise InputError(f"the router decides for whole sequences, and {wrong}")
  if balancer.needs_sequences:
    raise InputError(f"the balancer balances within each sequence, and {wrong}, or choose scope=global_batch")


def check_balancer(name: str, balancer: Balancer, num_experts: int, num_experts_per_token: int) -> None:
  """Raises `InputError` if a bias is not [E], a loss is no scalar, or `update` changes the state's structure or types.

  Such a state would train, and its checkpoint could not be loaded. Nothing is computed. E is `num_experts`.
  """
  state = jax.eval_shape(lambda: balancer.init(num_experts))
  bias = jax.eval_shape(balancer.bias, state)
  bias = bias.factor_E if isinstance(bias, ExpertScale) else bias
  if bias is not None and jnp.shape(bias) != (num_experts,):
    shape = list(jnp.shape(bias))
    raise InputError(f"balancer {name}: bias has shape {shape}; it must be [E] with E = {num_experts}")

  def updated(state, arrays):
    routing = BatchRouting(**arrays, group_size=4, num_experts_per_token=num_experts_per_token)
    observed = balancer.observe(state, routing)
    _check_losses(name, balancer.losses(state, routing, StepStats(whole=observed, so_far=observed)))
    return balancer.update(state, observed)

  f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  fields = ("logits_BLE", "log_scores_BLE", "selected_BLE", "smooth_load_BLE", "weights_BLE")
  arrays = dict.fromkeys(fields, f32(2, 4, num_experts))
  arrays["mask_BL"] = jax.ShapeDtypeStruct((2, 4), jnp.bool_)
  arrays["outputs"] = ExpertOutputs(f32(num_experts, 8), f32(num_experts))
  after = jax.eval_shape(updated, state, arrays)
  was, now = _described(state), _described(after)
  if was != now or jax.tree.structure(state) != jax.tree.structure(after):
    raise InputError(
      f"balancer {name}: update changes its state from {was} to {now}; it must keep the structure, shapes and types of "
      "init"
    )


def _check_losses(name: str, losses: Any) -> None:
  """Raises `InputError` unless `losses` is a dict from names to scalars."""
  if not isinstance(losses, dict) or not all(isinstance(key, str) for key in losses):
    kind = (
      f"a value of type {type_name(losses)}" if not isinstance(losses, dict) else f"the keys {list(losses)}"
    )
    raise InputError(f"balancer {name}: losses returns {kind}; it must return a dict from names to scalars")
  for key, loss in losses.items():
    found = _typed(loss)
    if jnp.shape(loss) or not found.startswith(("float", "bfloat")):
      raise InputError(f"balancer {name}: its loss {key!r} is {found}; it must be a scalar of a float type")


def check_routing(
  what: str, router: Router, routing: Routing, shape: tuple[int, ...], num_experts: int
) -> None:
  """Raises `InputError` if what a router returned has not the shapes and types of a `Routing`. Reads no number.

  Args:
    what: begins the message.
    router: returned it.
    routing: to check.
    shape: of the router's input x_GTD.
    num_experts: the number of experts that have a network.
  """
  if not isinstance(routing, Routing) or not isinstance(routing.assignment, Assignment):
    wrong = "another assignment" if isinstance(routing, Routing) else f"a value of type {type_name(routing)}"
    raise InputError(f"{what}: returns {wrong}; it must return a moe_jax.types.Routing with an Assignment")
  g, t, _ = shape
  e = router.num_scored_experts or num_experts
  a = routing.assignment
  by_expert, entries = ("[G, T, E]", (g, t, e)), ("[G, A]", (g, *jnp.shape(a.token_A)[1:2]))
  real, whole, truth = (jnp.floating, "float"), (jnp.integer, "integer"), (jnp.bool_, "bool")
  fields = {
    "logits_TE": (routing.logits_TE, real, by_expert),
    "log_scores_TE": (routing.log_scores_TE, real, by_expert),
    "mask_T": (routing.mask_T, truth, ("[G, T]", (g, t))),
    "token_A": (a.token_A, whole, entries),
    "expert_A": (a.expert_A, whole, entries),
    "weight_A": (a.weight_A, real, entries),
    "valid_A": (a.valid_A, truth, entries),
    "holds_slot_A": (a.holds_slot_A, truth, entries),
    "smooth_load_TE": (routing.smooth_load_TE, real, by_expert),
    "direct_TD": (routing.direct_TD, real, ("[G, T, D]", shape)),
  }
  may_lack = {"holds_slot_A", "direct_TD"} | (set() if router.gives_smooth_load else {"smooth_load_TE"})
  for name, (value, (kind, word), (axes, wanted)) in fields.items():
    if value is None and name in may_lack:
      continue
    is_right = value is not None and jnp.shape(value) == wanted and len(wanted) == len(axes.split(","))
    if not is_right or not jnp.issubdtype(jnp.result_type(value), kind):
      now = "None" if value is None else _typed(value)
      raise InputError(f"{what}: {name} is {now}; it must be {word} {axes} = {list(wanted)}")
  if e > num_experts and routing.direct_TD is None:
    raise InputError(
      f"{what}: scores {e} experts, of which {num_experts} have a network, and sets no direct_TD for the others"
    )


def check_kept(what: str, before: Iterable[tuple[Any, nnx.Variable, list[Array]]]) -> None:
  """Raises `InputError` if a variable has another value than `before`, where `moe_jax.nn.variables.values_of` made that.

  A forward pass works on a copy of the variables, so what it changes is lost. This finds it while tracing.
  """
  for path, variable, arrays in before:
    now = jax.tree.leaves(variable.get_value())
    if len(now) != len(arrays) or any(x is not was for x, was in zip(now, arrays, strict=True)):
      name = path if isinstance(path, str) else ".".join(map(str, path))
      raise InputError(
        f"{what}: its variable {name} changes in the forward pass, and is lost; use a balancer or a hook"
      )


def type_name(value: Any) -> str:
  """Returns the name of a type for a message. An array that is traced is an Array to a user."""
  return "Array" if isinstance(value, jax.Array) else type(value).__name__


def _typed(value: Any) -> str:
  return f"{jnp.result_type(value)}{list(jnp.shape(value))}"


def _described(state: PyTree) -> str:
  """Returns the state with a text such as `float32[8]` for each leaf."""
  each = jax.tree.map(lambda leaf: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]", state)
  return str(each).replace("'", "")
