"""Experts with two matrices and an activation between them: ReLU (as in GShard and Switch) and GELU."""

import jax
from flax import nnx

from moe_jax.nn.experts.base import INTO, OUT, ExpertNetwork
from moe_jax.nn.variables import matrix
from moe_jax.ops.experts import Product
from moe_jax.types import Array


class ReLU(ExpertNetwork):
  """`relu(x Wu) Wd`."""

  activation = staticmethod(jax.nn.relu)

  def __init__(self, num_experts: int, dim: int, expert_dim: int, *, init_scale: float = 1.0, rngs: nnx.Rngs):
    self.w_up_EDF = matrix(rngs, (num_experts, dim, expert_dim), INTO, init_scale)
    self.w_down_EFD = matrix(rngs, (num_experts, expert_dim, dim), OUT, init_scale)

  def __call__(self, rows: Array, product: Product) -> Array:
    return product.ffn(self.activation, rows, (self.w_up_EDF[...],), self.w_down_EFD[...])


class GELU(ReLU):
  """`gelu(x Wu) Wd` (1606.08415, in its tanh form)."""

  activation = staticmethod(jax.nn.gelu)
