"""Modules that add a part to the residual stream. `RESIDUALS` has all of them by name."""

from collections.abc import Callable

import jax
from flax import nnx

from moe_jax.nn.context import Context
from moe_jax.nn.norm import RMSNorm
from moe_jax.registry import Registry
from moe_jax.types import Array, PyTree

Part = Callable[[Array, Context], tuple[Array, PyTree]]


class PreNorm(nnx.Module):
  """x + part(norm(x)), as in every pre-norm transformer (2002.04745)."""

  def __init__(self, dim: int, *, norm_eps: float = 1e-6):
    self.norm = RMSNorm(dim, norm_eps)

  def __call__(self, part: Part, x_BLD: jax.Array, context: Context) -> tuple[jax.Array, PyTree]:
    y_BLD, aux = part(self.norm(x_BLD), context)
    return x_BLD + y_BLD, aux


class NormedInput(nnx.Module):
  """alpha norm(x) + beta part(norm(x)), as in MiniMax-01 (2501.08313). The residual is the *normed* input.

  MiniMax-01 has beta = 1 and, as DeepNorm, alpha = (2 * layers)^0.25, which is 3.5566 for 80 layers.
  """

  def __init__(self, dim: int, *, alpha: float = 3.5566, beta: float = 1.0, norm_eps: float = 1e-6):
    self.norm, self.alpha, self.beta = RMSNorm(dim, norm_eps), alpha, beta

  def __call__(self, part: Part, x_BLD: jax.Array, context: Context) -> tuple[jax.Array, PyTree]:
    x_BLD = self.norm(x_BLD)
    y_BLD, aux = part(x_BLD, context)
    return self.alpha * x_BLD + self.beta * y_BLD, aux


RESIDUALS = Registry(
  "residual", {"pre_norm": PreNorm, "normed_input": NormedInput}, offered=("dim", "norm_eps")
)
