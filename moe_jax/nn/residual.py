"""Modules that add a part to the residual stream. `RESIDUALS` has all of them by name.

A residual maps (part, x_BLD, context) to (x_BLD, aux): x_BLD keeps its shape and type, and aux is what the part returned
with its y_BLD. What a residual changes in its forward pass is lost.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.errors import InputError
from moe_jax.nn.context import Context
from moe_jax.nn.norm import RMSNorm
from moe_jax.registry import Registry
from moe_jax.types import Array, PyTree

Part = Callable[[Array, Context], tuple[Array, PyTree]]
# Folded into the key of a sequence, with 0 or 1 taken off for the part. The other draws of a layer fold in less, or one more.
_DROPS = 2**32 - 2


class Dropout(nnx.Module):
  """In training, elements of what a part adds are set to 0 with probability `rate`, and the others divided by 1 - rate.

  Which ones follows from the key of the sequence, the layer and the part, so the draw is the same on any mesh and in any
  micro-batch.

  Args:
    rate: 0 draws nothing.
    part_number: 0 for the mixer of a block, 1 for its feed-forward part.

  Raises:
    InputError: if `rate` is not in [0, 1).
  """

  def __init__(self, rate: float, part_number: int, what: str):
    if not 0 <= rate < 1:
      raise InputError(f"{what}: dropout must be in [0, 1), got {rate}")
    self.rate, self.part_number = rate, part_number

  def __call__(self, y_BLD: jax.Array, context: Context) -> jax.Array:
    if not self.rate or not context.train or context.key_B is None:
      return y_BLD
    salt = np.uint32(_DROPS - self.part_number)
    draw = lambda key: jax.random.bernoulli(
      jax.random.fold_in(key, salt), jnp.float32(1 - self.rate), y_BLD.shape[1:]
    )
    return jnp.where(jax.vmap(draw)(context.key_B), y_BLD / (1 - self.rate), 0).astype(y_BLD.dtype)


class PreNorm(nnx.Module):
  """x + part(norm(x)), as in every pre-norm transformer (2002.04745).

  `dropout` is of what the part adds, in training. Switch has 0.1 when it tunes (2101.03961, section 2.4).
  """

  def __init__(self, dim: int, *, dropout: float = 0.0, norm_eps: float = 1e-6, part_number: int = 0):
    self.norm, self.dropout = RMSNorm(dim, norm_eps), Dropout(dropout, part_number, "residual pre_norm")

  def __call__(self, part: Part, x_BLD: jax.Array, context: Context) -> tuple[jax.Array, PyTree]:
    y_BLD, aux = part(self.norm(x_BLD), context)
    return x_BLD + self.dropout(y_BLD, context), aux


class NormedInput(nnx.Module):
  """alpha norm(x) + beta part(norm(x)), as in MiniMax-01 (2501.08313). The residual is the *normed* input.

  MiniMax-01 has beta = 1 and, as DeepNorm, alpha = (2 * layers)^0.25, which is 3.5566 for 80 layers. `dropout` is of what
  the part adds, in training.
  """

  def __init__(
    self,
    dim: int,
    *,
    alpha: float = 3.5566,
    beta: float = 1.0,
    dropout: float = 0.0,
    norm_eps: float = 1e-6,
    part_number: int = 0,
  ):
    self.norm, self.alpha, self.beta = RMSNorm(dim, norm_eps), alpha, beta
    self.dropout = Dropout(dropout, part_number, "residual normed_input")

  def __call__(self, part: Part, x_BLD: jax.Array, context: Context) -> tuple[jax.Array, PyTree]:
    x_BLD = self.norm(x_BLD)
    y_BLD, aux = part(x_BLD, context)
    return self.alpha * x_BLD + self.beta * self.dropout(y_BLD, context), aux


RESIDUALS = Registry(
  "residual",
  {"pre_norm": PreNorm, "normed_input": NormedInput},
  offered=("dim", "norm_eps", "part_number"),
)
