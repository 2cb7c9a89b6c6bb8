"""Muon: the momentum of each matrix, orthogonalised."""

import math

import jax
import optax
from flax import nnx
from optax import contrib

from moe_jax.errors import InputError
from moe_jax.nn.variables import per_variable

# Matrices from or to one of these are no hidden layers: embedding and output matrix, routers, and the learned vectors
# and mixing weights of experts that compute nothing.
NOT_HIDDEN = frozenset({"vocab", "router", "zero_computation"})
UPDATE_SIZE = 0.2  # the root mean square of an update, about that of AdamW (2502.16982)


def is_hidden_matrix(variable: nnx.Variable) -> bool:
  """Returns whether Muon updates the parameter: `matrix` made it, and it is neither input, output nor router."""
  metadata = variable.get_metadata()
  return "num_in" in metadata and not NOT_HIDDEN & set(metadata["logical_axes"])


def scale_by_muon(momentum: float, otherwise: optax.GradientTransformation) -> optax.GradientTransformation:
  """Returns Muon's direction, in the form of Kimi K2 (2507.20534): NewtonSchulz(M) * sqrt(max(n, m)) * 0.2.

  M = momentum * M + gradient, and n x m is the shape of the matrix. Newton-Schulz is optax's: five steps with the
  coefficients of Keller Jordan. It runs on each matrix by itself, never across stacked layers or experts: an array
  [R, E, D, F] is R * E matrices D x F. Heads belong to one matrix: queries [D, N, H] are D x (N H), and the output
  projection [N, H, D] is (N H) x D.

  Args:
    momentum: in [0, 1).
    otherwise: transforms the gradients of all parameters that are no hidden matrices.

  Raises:
    InputError: if `momentum` is not in [0, 1).
  """
  if not 0 <= momentum < 1:
    raise InputError(f"optimizer muon: momentum must be in [0, 1), got {momentum}")
  # optax averages gradients, where Muon sums them. Newton-Schulz divides by the norm, so the direction is the same.
  direction = contrib.scale_by_muon(
    beta=momentum, nesterov=False, weight_dimension_numbers=per_variable(_rows_and_columns)
  )
  scale = optax.stateless(lambda updates, params: per_variable(_scaled)(updates))
  label = per_variable(lambda v: "muon" if is_hidden_matrix(v) else "otherwise")
  return optax.partition({"muon": optax.chain(direction, scale), "otherwise": otherwise}, label)


def _rows_and_columns(variable: nnx.Variable) -> contrib.MuonDimensionNumbers | optax.MaskedNode:
  """Returns which axes are rows and columns. The others, of layers and experts, count matrices."""
  value, metadata = variable.get_value(), variable.get_metadata()
  if isinstance(value, optax.MaskedNode):  # of another group
    return value
  axes = metadata["logical_axes"]
  stacked = value.ndim - len(axes)  # layers
  matrix = [stacked + i for i, name in enumerate(axes) if name != "expert"]
  num_in = metadata["num_in"]
  return contrib.MuonDimensionNumbers(tuple(matrix[:num_in]), tuple(matrix[num_in:]))


def _scaled(variable: nnx.Variable) -> jax.Array | optax.MaskedNode:
  numbers = _rows_and_columns(variable)
  if isinstance(numbers, optax.MaskedNode):
    return numbers
  value = variable.get_value()
  size = lambda axes: math.prod(value.shape[i] for i in axes)
  larger = max(size(numbers.reduction_axis), size(numbers.output_axis))
  return value * (UPDATE_SIZE * math.sqrt(larger))
