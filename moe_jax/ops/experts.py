"""The feed-forward network of one expert, written once for every way of multiplying by E matrices."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from moe_jax.ops.grouped_matmul import grouped_ffn
from moe_jax.types import Array

# matmul(rows_..X, w_EXY) -> rows_..Y: each row times the matrix of the expert that the row belongs to.
# The dispatcher supplies it, because only the dispatcher knows which row belongs to whom.
Matmul = Callable[[Array, Array], Array]


class SortedByExpert(NamedTuple):
  """Supplied instead of a matmul where the rows are sorted by expert: how many belong to each. At least
  `grouped_matmul.BLOCK` rows of no expert follow."""

  group_sizes_E: Array


class ExpertWeights(NamedTuple):
  """Weights of E experts: SwiGLU with three matrices, or ReLU with two.

  Callable as dispatchers call experts, and a tree of arrays, so what spreads them over devices passes them as
  arguments and calls those that it finds on its device.
  """

  w_gate_EDF: Array | None  # None: ReLU experts
  w_up_EDF: Array
  w_down_EFD: Array

  def __call__(self, rows: Array, matmul: Matmul | SortedByExpert) -> Array:
    return expert_ffn(self, rows, matmul)


# Logical axes of each field.
WEIGHT_AXES = ExpertWeights(
  ("expert", "embed", "mlp"), ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
)


def _swiglu(gate: Array, up: Array) -> Array:
  return jax.nn.silu(gate) * up


def expert_ffn(weights: ExpertWeights, rows: Array, matmul: Matmul | SortedByExpert) -> Array:
  """`(silu(x Wg) * (x Wu)) Wd` (2002.05202) or `relu(x Wu) Wd` for every row, [.., D] -> [.., D].

  A row of zeros gives zeros, so empty slots need no mask.
  """
  activation, w_in = jax.nn.relu, (weights.w_up_EDF,)
  if weights.w_gate_EDF is not None:
    activation, w_in = _swiglu, (weights.w_gate_EDF, weights.w_up_EDF)
  if isinstance(matmul, SortedByExpert):
    return grouped_ffn(activation, rows, w_in, weights.w_down_EFD, matmul.group_sizes_E)
  return matmul(activation(*(matmul(rows, w) for w in w_in)), weights.w_down_EFD)
