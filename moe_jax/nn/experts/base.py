"""The contract of experts: a module whose parameters have a leading expert axis."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.variables import weight
from moe_jax.ops.experts import Experts, Product
from moe_jax.registry import Spec
from moe_jax.types import Array


class ExpertNetwork(nnx.Module):
  """E networks at once: `rows = experts(rows, product)`, [.., D] -> [.., D].

  Every parameter names its logical axes, the first of which is "expert"; nothing else about them is known to the
  layer, the dispatchers, sharding or checkpoints. `product` multiplies each row by the matrix of its expert, see
  `moe_jax.ops.experts.Product`.

  draws: reads `product.row_bits`, which then are there.
  """

  draws: bool = False

  def __call__(self, rows: Array, product: Product) -> Array:
    raise NotImplementedError

  def for_step(self, key: Array | None) -> "ExpertNetwork":
    """The experts of one optimizer step, where they draw something. `key`: of the step; None: nothing is drawn."""
    del key
    return self


def as_experts(module: ExpertNetwork, dtype: jnp.dtype, gather: bool) -> Experts:
  """`module` as dispatchers want it.

  Args:
    module: the experts.
    dtype: that its floating-point parameters are cast to.
    gather: make parameters whole that are kept in parts (fsdp), as for a dispatcher that leaves that to us.
  """
  graphdef, state = nnx.split(module)
  is_variable = lambda leaf: isinstance(leaf, nnx.Variable)
  variables, tree = jax.tree.flatten(state, is_leaf=is_variable)

  def value(variable: nnx.Variable) -> Array:
    if not jnp.issubdtype(variable.get_value().dtype, jnp.floating):
      return variable.get_value()
    return weight(variable, dtype) if gather else variable[...].astype(dtype)

  def compute(weights: tuple[Array, ...], rows: Array, product: Product) -> Array:
    own = [variable.replace(w) for variable, w in zip(variables, weights, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, own))(rows, product)

  axes = tuple(variable.get_metadata()["logical_axes"] for variable in variables)
  return Experts(tuple(map(value, variables)), axes, compute)


def inner_experts(spec: Spec, num_experts: int, dim: int, expert_dim: int, **offered: Any) -> ExpertNetwork:
  """The network that another one changes."""
  from moe_jax.nn.experts import EXPERTS  # which has this module's users

  sizes = {"num_experts": num_experts, "dim": dim, "expert_dim": expert_dim}
  return EXPERTS.resolve(spec)(**sizes, **offered)


INTO, OUT = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")  # logical axes of the usual matrices
