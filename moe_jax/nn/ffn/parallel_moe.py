"""A dense feed-forward part in parallel with the experts, as in Gemma 4."""

import jax
from flax import nnx

from moe_jax.nn.context import DEFAULT, Context
from moe_jax.nn.ffn.mlp import MLP
from moe_jax.nn.moe import MoE
from moe_jax.types import MoEAux


class ParallelMoE(nnx.Module):
  """moe(x) + mlp(x): all tokens also go through a dense part, which has its own width."""

  def __init__(self, moe: MoE, mlp: MLP):
    self.moe, self.mlp = moe, mlp

  def __call__(self, x_BLD: jax.Array, context: Context = DEFAULT) -> tuple[jax.Array, MoEAux]:
    y_BLD, aux = self.moe(x_BLD, context)
    return y_BLD + self.mlp(x_BLD)[0], aux
