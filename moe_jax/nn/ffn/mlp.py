"""The dense feed-forward part: SwiGLU (2002.05202), ReLU or GELU."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.context import Context
from moe_jax.nn.experts.bounded_swiglu import Bounded
from moe_jax.nn.variables import matrix, vector, weight
from moe_jax.ops.experts import swiglu

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu}
GATED = {"swiglu": swiglu, "bounded_swiglu": Bounded(10.0)}  # 10: DeepSeek-V4's, in its shared expert too


class MLP(nnx.Module):
  """A dense network with `dense_dim` hidden units: `y_BLD, None = mlp(x_BLD)`. Also used for shared experts.

  Args:
    dim: D.
    dense_dim: the hidden width.
    activation: swiglu, bounded_swiglu, relu or gelu.
    init_scale: s in std = sqrt(s / fan_in) of every matrix.
    rngs: draws the parameters.
  """

  def __init__(
    self, dim: int, dense_dim: int, activation: str = "swiglu", *, init_scale: float = 1.0, rngs: nnx.Rngs
  ):
    into, out, scale = ("embed", "mlp"), ("mlp", "embed"), init_scale
    self.activation = activation
    self.w_gate_DF = matrix(rngs, (dim, dense_dim), into, scale) if activation in GATED else None
    self.w_up_DF = matrix(rngs, (dim, dense_dim), into, scale)
    self.w_down_FD = matrix(rngs, (dense_dim, dim), out, scale)

  def __call__(self, x_BLD: jax.Array, context: Context | None = None) -> tuple[jax.Array, None]:
    del context
    dtype = x_BLD.dtype
    up_BLF = x_BLD @ weight(self.w_up_DF, dtype)
    if self.w_gate_DF is None:
      hidden_BLF = ACTIVATIONS[self.activation](up_BLF)
    else:
      hidden_BLF = GATED[self.activation](x_BLD @ weight(self.w_gate_DF, dtype), up_BLF)
    return hidden_BLF @ weight(self.w_down_FD, dtype), None


class GatedMLP(MLP):
  """sigmoid(x w) mlp(x): a dense network whose output each token scales, as Qwen's shared expert (released code).

  w starts at zero, so the scale starts at 1/2 (our choice).
  """

  def __init__(
    self, dim: int, dense_dim: int, activation: str = "swiglu", *, init_scale: float = 1.0, rngs: nnx.Rngs
  ):
    super().__init__(dim, dense_dim, activation, init_scale=init_scale, rngs=rngs)
    self.w_shared_gate_D = vector(jnp.zeros(dim), ("embed",))

  def __call__(self, x_BLD: jax.Array, context: Context | None = None) -> tuple[jax.Array, None]:
    y_BLD, _ = super().__call__(x_BLD, context)
    gate_BL = jax.nn.sigmoid(x_BLD @ weight(self.w_shared_gate_D, x_BLD.dtype))
    return gate_BL[..., None] * y_BLD, None
