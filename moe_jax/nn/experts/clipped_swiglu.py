"""The experts of gpt-oss: SwiGLU with biases, clipped."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.experts.base import INTO, OUT, ExpertNetwork
from moe_jax.nn.variables import matrix, vector
from moe_jax.ops.experts import Product
from moe_jax.types import Array


class ClippedSwiGLU(ExpertNetwork):
  """`((u + 1) * g * sigmoid(alpha g)) Wd + bd`.

  Here g = min(x Wg + bg, limit) and u = clip(x Wu + bu, -limit, limit). gpt-oss (2508.10925 and its released
  code) uses limit 7 and alpha 1.702, with which g * sigmoid(alpha g) approximates GELU. Biases start at 0.
  """

  def __init__(
    self,
    num_experts: int,
    dim: int,
    expert_dim: int,
    *,
    alpha: float = 1.702,
    limit: float = 7.0,
    init_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    e, d, f = num_experts, dim, expert_dim
    self.alpha, self.limit = alpha, limit
    self.w_gate_EDF = matrix(rngs, (e, d, f), INTO, init_scale)
    self.w_up_EDF = matrix(rngs, (e, d, f), INTO, init_scale)
    self.w_down_EFD = matrix(rngs, (e, f, d), OUT, init_scale)
    self.b_gate_EF = vector(jnp.zeros((e, f)), ("expert", "mlp"))
    self.b_up_EF = vector(jnp.zeros((e, f)), ("expert", "mlp"))
    self.b_down_ED = vector(jnp.zeros((e, d)), ("expert", "embed"))

  def __call__(self, rows: Array, product: Product) -> Array:
    gate = product(rows, self.w_gate_EDF[...]) + product.per_row(self.b_gate_EF[...])
    up = product(rows, self.w_up_EDF[...]) + product.per_row(self.b_up_EF[...])
    gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
    hidden = product.hidden((up + 1) * gate * jax.nn.sigmoid(self.alpha * gate))
    return product(hidden, self.w_down_EFD[...]) + product.per_row(self.b_down_ED[...]) / product.parts
