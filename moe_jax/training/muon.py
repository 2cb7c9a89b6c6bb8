"""Muon: the momentum of each matrix, orthogonalised."""

import functools
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
  direction = optax.stateless(lambda updates, params: per_variable(_direction)(updates))
  label = per_variable(lambda v: "muon" if is_hidden_matrix(v) else "otherwise")
  return optax.partition(
    {"muon": optax.chain(optax.trace(momentum), direction), "otherwise": otherwise}, label
  )


def _direction(variable: nnx.Variable) -> jax.Array | optax.MaskedNode:
  """Returns the scaled direction of each matrix of a momentum.

  optax would join the axes of layers and experts, and the compiler would then gather all matrices on every device. Here
  the axis of experts stays as it is, and layers come one after the other.
  """
  value, metadata = variable.get_value(), variable.get_metadata()
  if isinstance(value, optax.MaskedNode):  # of another group
    return value
  axes = metadata["logical_axes"]
  stacked = value.ndim - len(axes)  # layers
  function = functools.partial(_of_one, num_in=metadata["num_in"])
  if "expert" in axes:
    function = jax.vmap(function, axes.index("expert"), axes.index("expert"))
  for _ in range(stacked):
    function = functools.partial(jax.lax.map, function)
  return function(value)


def _of_one(momentum: jax.Array, num_in: int) -> jax.Array:
  """Of one matrix, whose first `num_in` axes are rows and the others columns."""
  matrix = momentum.reshape(math.prod(momentum.shape[:num_in]), -1)
  muon = contrib.scale_by_muon(beta=0.0, nesterov=False)  # without momentum of its own
  direction, _ = muon.update(matrix, muon.init(matrix))
  return direction.reshape(momentum.shape) * (UPDATE_SIZE * math.sqrt(max(matrix.shape)))
