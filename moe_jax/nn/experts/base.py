"""The contract of experts: a module whose parameters have a leading expert axis."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.variables import weight
from moe_jax.ops.experts import Experts, Product
from moe_jax.types import Array


class ExpertNetwork(nnx.Module):
  """E networks at once: `rows = experts(rows, product)`, [.., D] -> [.., D].

  Every parameter names its logical axes, the first of which is "expert"; nothing else about them is known to the
  layer, the dispatchers, sharding or checkpoints. `product` multiplies each row by the matrix of its expert, see
  `moe_jax.ops.experts.Product`.
  """

  def __call__(self, rows: Array, product: Product) -> Array:
    raise NotImplementedError

  def for_step(self, key: Array | None) -> "ExpertNetwork":
    """The experts of one optimizer step, where they draw something. `key`: None outside of training."""
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


INTO, OUT = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")  # logical axes of the usual matrices
