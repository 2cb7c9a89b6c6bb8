"""The dense feed-forward block: SwiGLU (2002.05202) or ReLU."""

import jax
from flax import nnx

from moe_jax.nn.variables import matrix, weight


class MLP(nnx.Module):
  """x_BLD -> y_BLD through `hidden` units; also the shared experts of an MoE layer."""

  def __init__(self, dim: int, hidden: int, activation: str, scale: float, *, rngs: nnx.Rngs):
    self.w_gate_DF = matrix(rngs, (dim, hidden), ("embed", "mlp"), scale) if activation == "swiglu" else None
    self.w_up_DF = matrix(rngs, (dim, hidden), ("embed", "mlp"), scale)
    self.w_down_FD = matrix(rngs, (hidden, dim), ("mlp", "embed"), scale)

  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    dtype = x_BLD.dtype
    up_BLF = x_BLD @ weight(self.w_up_DF, dtype)
    if self.w_gate_DF is None:
      hidden_BLF = jax.nn.relu(up_BLF)
    else:
      hidden_BLF = jax.nn.silu(x_BLD @ weight(self.w_gate_DF, dtype)) * up_BLF
    return hidden_BLF @ weight(self.w_down_FD, dtype)
