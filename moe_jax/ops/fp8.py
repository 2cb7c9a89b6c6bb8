"""FP8 in products, as DeepSeek-V3 trains with it (2412.19437, section 3.3), emulated exactly on any device.

A number is stored in 8 bits (E4M3), and a block of them shares a float32 scale. Products are those of the numbers
that are stored, summed in float32. Nothing is faster or smaller here: this is for studying the rounding.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from moe_jax.ops.quantisation import FORMATS, dequantise, quantise
from moe_jax.types import Array

TILE = (1, 128)  # of activations and their gradients: 128 features of one row
BLOCK = (128, 128)  # of a matrix


def quantised(x: Array, block: tuple[int, int]) -> Array:
  """Returns what FP8 stores of x, as float32.

  Args:
    x: [.., X, Y] of any float type.
    block: the rows and columns that share a scale. Those at the edges may be smaller.
  """
  format, w_EXY = dataclasses.replace(FORMATS["fp8"], block=block), x.reshape(-1, *x.shape[-2:])
  return dequantise(*quantise(w_EXY, format), format, x.shape[-2]).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def straight_through(x: Array, block: tuple[int, int]) -> Array:
  """Returns `quantised(x, block)`, whose gradient is that of x."""
  return quantised(x, block)


straight_through.defvjp(
  lambda x, block: (quantised(x, block), jnp.zeros((), x.dtype)),
  lambda block, like, d: (d.astype(like.dtype),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def quantised_gradient(x: Array, block: tuple[int, int]) -> Array:
  """Returns x, whose gradient is quantised on its way back."""
  del block
  return x


quantised_gradient.defvjp(
  lambda x, block: (x, None), lambda block, _, d: (quantised(d, block).astype(d.dtype),)
)
