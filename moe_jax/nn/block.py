"""A block: a token mixer and a feed-forward part, each on the residual stream."""

from collections.abc import Callable
from typing import NamedTuple

from flax import nnx

from moe_jax.nn.context import Context
from moe_jax.types import Array, PyTree


class BlockAux(NamedTuple):
  """What the parts of a block know besides their output; None for a part that knows nothing."""

  mixer: PyTree
  ffn: PyTree


class Block(nnx.Module):
  """`x_BLD, aux = block(x_BLD, context)`.

  Args:
    mixer, ffn: modules `part(x_BLD, context) -> (y_BLD, aux)`.
    residual: makes what brings each of them to the stream, `residual(part, x_BLD, context) -> (x_BLD, aux)`.
  """

  def __init__(self, mixer: nnx.Module, ffn: nnx.Module, residual: Callable[[], nnx.Module]):
    self.mixer_residual, self.mixer = residual(), mixer
    self.ffn_residual, self.ffn = residual(), ffn

  def __call__(self, x_BLD: Array, context: Context) -> tuple[Array, BlockAux]:
    x_BLD, mixer_aux = self.mixer_residual(self.mixer, x_BLD, context)
    x_BLD, ffn_aux = self.ffn_residual(self.ffn, x_BLD, context)
    return x_BLD, BlockAux(mixer_aux, ffn_aux)
