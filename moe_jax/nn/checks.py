"""Checks that the parts of an MoE layer fit together, before anything is drawn or compiled."""

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError, require_option
from moe_jax.nn.routers import Router
from moe_jax.ops.balancing import Balancer
from moe_jax.ops.metrics import is_taken
from moe_jax.types import BatchRouting, ExpertOutputs, ExpertScale, PyTree


def check_sizes(num_experts: int, num_experts_per_token: int) -> None:
  """Raises `InputError` unless a token can be sent to that many experts."""
  if not 1 <= num_experts_per_token <= num_experts:
    raise InputError(
      f"num_experts_per_token={num_experts_per_token}: must be between 1 and num_experts={num_experts}"
    )


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
  """Raises `InputError` if a bias is not [E], or if `update` changes the structure, shapes or types of the state.

  So does a name that another number in the logs has, because its loss would hide that number.
  Such a state would train, and its checkpoint could not be loaded. Nothing is computed. E is `num_experts`.
  """
  if is_taken(name):
    raise InputError(f"balancer {name}: another number in the logs has this name; choose another")
  state = jax.eval_shape(lambda: balancer.init(num_experts))
  bias = jax.eval_shape(balancer.bias, state)
  bias = bias.factor_E if isinstance(bias, ExpertScale) else bias
  if bias is not None and jnp.shape(bias) != (num_experts,):
    shape = list(jnp.shape(bias))
    raise InputError(f"balancer {name}: bias has shape {shape}; it must be [E] with E = {num_experts}")

  def updated(state, arrays):
    routing = BatchRouting(**arrays, group_size=4, num_experts_per_token=num_experts_per_token)
    return balancer.update(state, balancer.observe(state, routing))

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


def _described(state: PyTree) -> str:
  """Returns the state with a text such as `float32[8]` for each leaf."""
  each = jax.tree.map(lambda leaf: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]", state)
  return str(each).replace("'", "")
