"""FP8 in products, as DeepSeek-V3 trains with it (2412.19437, section 3.3), emulated exactly on any device.

A number is stored in 8 bits (E4M3), and a block of them shares a float32 scale. Products are those of the numbers
that are stored, summed in float32. Nothing is faster or smaller here: this is for studying the rounding.
"""

import functools

import jax
import jax.numpy as jnp

from moe_jax.types import Array

LARGEST = 448.0  # of E4M3
TILE = (1, 128)  # of activations and their gradients: 128 features of one row
BLOCK = (128, 128)  # of a matrix


def quantised(x: Array, block: tuple[int, int]) -> Array:
  """Returns what FP8 stores of x, as float32.

  The largest number of a block becomes 448 times its scale.

  Args:
    x: [.., X, Y] of any float type.
    block: the rows and columns that share a scale. Those at the edges may be smaller.
  """
  (rows, columns), x32 = block, x.astype(jnp.float32)
  *lead, height, width = x.shape
  pad = [(0, 0)] * len(lead) + [(0, -height % rows), (0, -width % columns)]
  tiles = jnp.pad(x32, pad).reshape(*lead, -(-height // rows), rows, -(-width // columns), columns)
  largest = jnp.abs(tiles).max(axis=(-3, -1), keepdims=True)
  scale = jnp.where(largest > 0, largest / LARGEST, 1.0)
  stored = (tiles / scale).astype(jnp.float8_e4m3fn).astype(jnp.float32) * scale
  return stored.reshape(*lead, height - height % -rows, width - width % -columns)[..., :height, :width]


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
