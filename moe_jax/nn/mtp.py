"""Multi-token prediction (DeepSeek-V3, 2412.19437, section 2.2): modules behind the stack that look one token further."""

import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.block import BlockAux
from moe_jax.nn.context import Context
from moe_jax.nn.norm import RMSNorm
from moe_jax.nn.stack import SegmentStack
from moe_jax.nn.variables import matrix, weight
from moe_jax.types import Array, StepStats


def ahead(x_BL: Array, steps: int) -> Array:
  """Returns what stands `steps` later in each sequence; zeros (False) where the sequence has ended."""
  length = x_BL.shape[1]
  return jnp.pad(x_BL[:, min(steps, length) :], ((0, 0), (0, min(steps, length))))


class Successor(nnx.Module):
  """A module of multi-token prediction: `x_BLD, aux = successor(x_BLD, embedded_BLD, context, step_stats)`.

  Its input is W [norm(x); norm(embedded)], where x comes from the module before it, or from the model (equation 21).
  One block and a norm follow. What equation 21 leaves open is as in the released model: the x of the model is
  behind the model's last norm, and every module has a last norm of its own. Embedding and output matrix are
  those of the model.

  Args:
    dim: D.
    stack: the block.
    norm_eps: added to the mean square in the norms.
    init_scale: s in std = sqrt(s / fan_in) of the matrix.
    rngs: draws the matrix.
  """

  def __init__(
    self, dim: int, stack: SegmentStack, *, norm_eps: float = 1e-6, init_scale: float = 1.0, rngs: nnx.Rngs
  ):
    self.hidden_norm, self.embedding_norm = RMSNorm(dim, norm_eps), RMSNorm(dim, norm_eps)
    # first what multiplies x, then what multiplies the embedding
    self.w_join_2DX = matrix(rngs, (2, dim, dim), ("join", "embed", "joined"), init_scale, num_in=2)
    self.stack = stack
    self.final_norm = RMSNorm(dim, norm_eps)

  def __call__(
    self, x_BLD: Array, embedded_BLD: Array, context: Context, step_stats: tuple[StepStats | None, ...]
  ) -> tuple[Array, tuple[BlockAux, ...]]:
    w_2DX = weight(self.w_join_2DX, x_BLD.dtype)
    joined_BLD = self.hidden_norm(x_BLD) @ w_2DX[0] + self.embedding_norm(embedded_BLD) @ w_2DX[1]
    y_BLD, aux = self.stack(joined_BLD, context, step_stats)
    return self.final_norm(y_BLD), aux
