"""Low-rank adapters on a frozen dense feed-forward part (LoRA, 2106.09685)."""

import jax
from flax import nnx

from moe_jax.nn.context import Context
from moe_jax.nn.low_rank import Adapters
from moe_jax.types import PyTree


class LowRankFFN(nnx.Module):
  """The dense part `ffn`, frozen, with a trained addition to each of its matrices: see `Adapters`.

  Args:
    ffn: maps (x_BLD, context) to (y_BLD, None).
    rank, alpha: the addition is alpha / rank * A B, with A [.., rank].
    what: of the part, for errors.
    rngs: draws A.

  Raises:
    InputError: if `rank` is less than 1, or the part has no matrices of its own.
  """

  def __init__(self, ffn: nnx.Module, rank: int, alpha: float, what: str, *, rngs: nnx.Rngs):
    self.ffn = ffn
    self.adapters = Adapters(ffn, rank, alpha, what, rngs=rngs)

  def __call__(self, x_BLD: jax.Array, context: Context | None = None) -> tuple[jax.Array, PyTree]:
    return self.adapters.apply(self.ffn, lambda ffn: ffn(x_BLD, context))
