"""A block: a token mixer and a feed-forward part, each added to the residual stream."""

from collections.abc import Callable
from typing import NamedTuple

from flax import nnx

from moe_jax.nn.context import Context
from moe_jax.types import Array, PyTree


class BlockAux(NamedTuple):
  """The aux of each part of a block: what it returns besides its output, or None."""

  mixer: PyTree
  ffn: PyTree


class Block(nnx.Module):
  """A block of a model: `x_BLD, aux = block(x_BLD, context)`.

  Args:
    mixer, ffn: modules that map (x_BLD, context) to (y_BLD, aux).
    residual: makes a module that adds a part to the residual stream: it maps (part, x_BLD, context) to
      (x_BLD, aux). Called once for the mixer and once for the feed-forward part.
  """

  def __init__(self, mixer: nnx.Module, ffn: nnx.Module, residual: Callable[[], nnx.Module]):
    self.mixer_residual, self.mixer = residual(), mixer
    self.ffn_residual, self.ffn = residual(), ffn

  def __call__(self, x_BLD: Array, context: Context) -> tuple[Array, BlockAux]:
    x_BLD, mixer_aux = self.mixer_residual(self.mixer, x_BLD, context)
    x_BLD, ffn_aux = self.ffn_residual(self.ffn, x_BLD, context)
    return x_BLD, BlockAux(mixer_aux, ffn_aux)
