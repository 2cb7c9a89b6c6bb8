"""A block: a token mixer and a feed-forward part, each added to the residual stream."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import InputError
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
      (x_BLD, aux). Called with `part_number` 0 for the mixer, and with 1 for the feed-forward part.
  """

  def __init__(self, mixer: nnx.Module, ffn: nnx.Module, residual: Callable[..., nnx.Module]):
    self.mixer_residual, self.mixer = residual(part_number=0), mixer
    self.ffn_residual, self.ffn = residual(part_number=1), ffn

  def __call__(self, x_BLD: Array, context: Context) -> tuple[Array, BlockAux]:
    x_BLD, mixer_aux = self.mixer_residual(self.mixer, x_BLD, context)
    x_BLD, ffn_aux = self.ffn_residual(self.ffn, x_BLD, context)
    return x_BLD, BlockAux(mixer_aux, ffn_aux)

  def init_cache(self, batch_size: int, length: int, dtype: jnp.dtype) -> PyTree:
    """Returns an empty cache of the mixer. Raises `InputError` if it has none."""
    if not hasattr(self.mixer, "init_cache"):
      raise InputError(
        f"mixer {type(self.mixer).__name__}: keeps no cache; give it the methods init_cache and extend, see Attention"
      )
    return self.mixer.init_cache(batch_size, length, dtype)

  def extend(self, x_BLD: Array, context: Context, cache: PyTree) -> tuple[Array, PyTree]:
    """Returns (x_BLD, cache) for tokens that follow those of the cache; `context.past` says where they stand."""
    mix = lambda x_BLD, context: self.mixer.extend(x_BLD, context, cache)
    x_BLD, cache = self.mixer_residual(mix, x_BLD, context)  # a residual returns the second value unchanged
    x_BLD, _ = self.ffn_residual(self.ffn, x_BLD, context)
    return x_BLD, cache
