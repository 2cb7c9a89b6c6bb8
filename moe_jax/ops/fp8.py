"""FP8 in products, as DeepSeek-V3 trains with it (2412.19437, section 3.3), emulated exactly on any device.

A number is stored in 8 bits (E4M3), and a block of them shares a float32 scale. Products are those of the numbers
that are stored, summed in float32. Nothing is faster or smaller here: this is for studying the rounding.
"""

import dataclasses
import functools
from collections.abc import Callable

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


def quantised_by_rows(x: Array, tile: Array, num_tiles: int) -> Array:
  """Returns what FP8 stores of x, as float32, where the rows of a tile share a scale in each column.

  Args:
    x: [.., Y] of any float type.
    tile: int32 [..], the tile of each row.
    num_tiles: one more than the largest tile.
  """
  x_MY, tile_M = x.astype(jnp.float32).reshape(-1, x.shape[-1]), tile.reshape(-1)
  largest = jax.ops.segment_max(jnp.abs(x_MY), tile_M, num_tiles)
  format = FORMATS["fp8"]
  scale_MY = jnp.where(largest > 0, largest / format.largest, 1.0)[tile_M]
  return (format.decode(format.encode(x_MY / scale_MY)) * scale_MY).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gradient_by_rows(x: Array, tile: Array, num_tiles: int) -> Array:
  """Returns x, whose gradient goes through `quantised_by_rows`."""
  del tile, num_tiles
  return x


_gradient_by_rows.defvjp(
  lambda x, tile, num_tiles: (x, tile),
  lambda num_tiles, tile, d: (quantised_by_rows(d, tile, num_tiles).astype(d.dtype), None),
)


@jax.custom_vjp
def _without_value(x: Array) -> Array:
  """Returns zeros, whose gradient is that of x. What x is computed from is not computed."""
  return jnp.zeros_like(x)


_without_value.defvjp(lambda x: (jnp.zeros_like(x), None), lambda _, d: (d,))


def fp8_product(
  product: Callable[[Array, Array], Array], rows: Array, w_EXY: Array, tile: Array, num_tiles: int
) -> Array:
  """Returns `product(rows, w_EXY)` with what FP8 stores of both, in float32, and of everything in its backward pass.

  Rows and the gradient of the output are in tiles of 1 x 128 where rows and their gradients are computed. For the
  gradient of the matrices, which sums over rows, both are in tiles of 128 rows x 1; rows are then rounded a second
  time, from their tiles of 1 x 128 (2412.19437, sections 3.3 and 3.5.2).

  Args:
    product: multiplies rows [.., X] by the matrices of their experts.
    rows, w_EXY: its arguments.
    tile, num_tiles: the tiles along rows, as `moe_jax.ops.experts.Product.row_tiles` gives them.
  """
  stored = straight_through(rows, TILE)
  y = quantised_gradient(product(stored, jax.lax.stop_gradient(straight_through(w_EXY, BLOCK))), TILE)
  of_gradient = quantised_by_rows(jax.lax.stop_gradient(stored), tile, num_tiles)
  only_w = product(of_gradient, w_EXY.astype(jnp.float32))
  return y + _without_value(_gradient_by_rows(only_w, tile, num_tiles))
