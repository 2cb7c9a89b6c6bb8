"""The base classes of experts: modules whose parameters have a leading expert axis."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.checks import check_kept
from moe_jax.nn.variables import values_of, weight
from moe_jax.ops.experts import Experts, Product
from moe_jax.registry import Spec, inner_spec
from moe_jax.types import Array


class ExpertNetwork(nnx.Module):
  """All E experts of a layer as one module: `rows = experts(rows, product)`, [.., D] -> [.., D].

  Every parameter names its logical axes, of which the first is "expert". The layer, dispatchers, sharding and
  checkpoints assume nothing else about the parameters. `product` multiplies each row by the matrix of its
  expert (see `moe_jax.ops.experts.Product`), so a network is written once for all dispatchers. What it changes in its
  forward pass is lost: state belongs to a hook. For some dispatchers, the empty slots of an expert are rows of zeros, so the
  output and its gradient must be finite there, too: what divides by the norm of a row adds an epsilon.

  draws: whether the network reads `product.row_bits`. The layer provides them only if it does.
  """

  draws: bool = False

  def __call__(self, rows: Array, product: Product) -> Array:
    raise NotImplementedError

  def for_step(self, key: Array | None) -> "ExpertNetwork":
    """Returns the experts for one forward pass, before dispatchers split them over devices.

    Override it to draw from `key`, which is None if nothing is drawn, or to change whole parameters.
    """
    del key
    return self

  def check_parts(self, parts: int) -> None:
    """Raises `InputError` if `parts` devices that each have a part of the hidden units would compute something else.

    The number divides the hidden units.
    """


class WrappingNetwork(ExpertNetwork):
  """The base class of networks around another one, `self.experts`, for which they draw what that one draws."""

  experts: ExpertNetwork

  def for_step(self, key: Array | None) -> ExpertNetwork:
    inner = self.experts.for_step(key)
    if inner is self.experts:
      return self
    drawn = nnx.clone(self)
    drawn.experts, drawn.draws = inner, inner.draws
    return drawn

  def check_parts(self, parts: int) -> None:
    self.experts.check_parts(parts)


def as_experts(module: ExpertNetwork, dtype: jnp.dtype, gather: bool) -> Experts:
  """Returns `module` in the form that dispatchers call.

  Args:
    module: the experts.
    dtype: the dtype that floating-point parameters are cast to.
    gather: whether to gather parameters that are stored split (fsdp). False for a dispatcher that does this
      itself.
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
    network = nnx.merge(graphdef, jax.tree.unflatten(tree, own))
    before = values_of(network)
    rows = network(rows, product)
    check_kept(f"experts {type(module).__name__}", before)
    return rows

  axes = tuple(variable.get_metadata()["logical_axes"] for variable in variables)
  return Experts(tuple(map(value, variables)), axes, compute)


def inner_experts(spec: Spec, num_experts: int, dim: int, expert_dim: int, **offered: Any) -> ExpertNetwork:
  """Returns the network that another network wraps. In a text, its options are behind `;`."""
  from moe_jax.nn.experts import EXPERTS  # which has this module's users

  sizes = {"num_experts": num_experts, "dim": dim, "expert_dim": expert_dim}
  return EXPERTS.resolve(inner_spec(spec))(**sizes, **offered)


INTO, OUT = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")  # logical axes of the usual matrices
