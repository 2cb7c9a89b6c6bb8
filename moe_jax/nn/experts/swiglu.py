"""SwiGLU experts (2002.05202)."""

from flax import nnx

from moe_jax.nn.experts.base import INTO, OUT, ExpertNetwork
from moe_jax.nn.variables import matrix
from moe_jax.ops.experts import Product, swiglu
from moe_jax.types import Array


class SwiGLU(ExpertNetwork):
  """`(silu(x Wg) * (x Wu)) Wd`."""

  activation = staticmethod(swiglu)

  def __init__(self, num_experts: int, dim: int, expert_dim: int, *, init_scale: float = 1.0, rngs: nnx.Rngs):
    e, d, f = num_experts, dim, expert_dim
    self.w_gate_EDF = matrix(rngs, (e, d, f), INTO, init_scale)
    self.w_up_EDF = matrix(rngs, (e, d, f), INTO, init_scale)
    self.w_down_EFD = matrix(rngs, (e, f, d), OUT, init_scale)

  def __call__(self, rows: Array, product: Product) -> Array:
    return product.ffn(
      self.activation, rows, (self.w_gate_EDF[...], self.w_up_EDF[...]), self.w_down_EFD[...]
    )
