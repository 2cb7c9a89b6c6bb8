"""The feed-forward network of one expert, written once for every way of multiplying by E matrices."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from moe_jax.types import Array

# matmul(rows_..X, w_EXY) -> rows_..Y: each row times the matrix of the expert that the row belongs to.
# The dispatcher supplies it, because only the dispatcher knows which row belongs to whom.
Matmul = Callable[[Array, Array], Array]


class ExpertWeights(NamedTuple):
  """Weights of E experts: SwiGLU with three matrices, or ReLU with two."""

  w_gate_EDF: Array | None  # None: ReLU experts
  w_up_EDF: Array
  w_down_EFD: Array


def expert_ffn(weights: ExpertWeights, rows: Array, matmul: Matmul) -> Array:
  """`(silu(x Wg) * (x Wu)) Wd` (2002.05202) or `relu(x Wu) Wd` for every row, [.., D] -> [.., D].

  A row of zeros gives zeros, so empty slots need no mask.
  """
  hidden = matmul(rows, weights.w_up_EDF)
  if weights.w_gate_EDF is None:
    hidden = jax.nn.relu(hidden)
  else:
    hidden = jax.nn.silu(matmul(rows, weights.w_gate_EDF)) * hidden
  return matmul(hidden, weights.w_down_EFD)
