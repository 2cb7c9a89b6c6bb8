"""Experts as dispatchers see them: a tree of arrays, and a function that computes rows from it.

The function is written once for all ways of multiplying by E matrices. The dispatcher supplies the `Product`,
because only the dispatcher knows which row belongs to which expert.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from moe_jax.ops.grouped_matmul import BLOCK, grouped_ffn, grouped_matmul
from moe_jax.types import Array

Activation = Callable[..., Array]  # one or two arrays of hidden units -> hidden units; zeros give zeros


class Product(Protocol):
  """Multiplies rows by the matrices of their experts.

  parts: the number of devices whose outputs add up to the output of the experts, each with a part of the
    hidden units. An output bias must be divided by it, because every device adds one.
  row_bits: uint32 [..], random bits for the token of each row. They do not depend on where the row is
    computed. None if nothing is drawn.
  """

  parts: int
  row_bits: Array | None

  def __call__(self, rows: Array, w_EXY: Array) -> Array:
    """Returns every row times the matrix of its expert: [.., X] -> [.., Y]."""

  def per_row(self, values_EX: Array) -> Array:
    """Returns the vector of its expert for every row, such as a bias.

    The result broadcasts with rows [.., X].
    """

  def row_tiles(self, rows: Array, size: int) -> tuple[Array, int]:
    """Returns the tile of each row, int32 [..], and the number of tiles.

    A tile is `size` rows of one expert that follow each other, or the fewer rows at its end.
    """

  def hidden(self, rows: Array) -> Array:
    """Returns the hidden units that enter the last product.

    A wrapper may change them, for example drop some.
    """

  def ffn(self, activation: Activation, rows: Array, w_in: Sequence[Array], w_out_EFD: Array) -> Array:
    """Returns `activation(*(rows w for w in w_in)) w_out`, computed in one pass if that is faster."""


class Batched(NamedTuple):
  """The product for rows [E, M, D], with M rows for each expert.

  Empty slots may hold any values, which are not read.
  """

  parts: int = 1
  row_bits: Array | None = None

  def __call__(self, rows_EMX: Array, w_EXY: Array) -> Array:
    return jnp.einsum("EMX,EXY->EMY", rows_EMX, w_EXY)

  def per_row(self, values_EX: Array) -> Array:
    return values_EX[:, None]

  def row_tiles(self, rows: Array, size: int) -> tuple[Array, int]:
    num_experts, num_rows = rows.shape[:2]
    each = -(-num_rows // size)
    tile_EM = jnp.arange(num_experts)[:, None] * each + jnp.arange(num_rows)[None] // size
    return tile_EM, num_experts * each

  def hidden(self, rows: Array) -> Array:
    return rows

  def ffn(self, activation: Activation, rows: Array, w_in: Sequence[Array], w_out_EFD: Array) -> Array:
    return self(self.hidden(activation(*(self(rows, w) for w in w_in))), w_out_EFD)


class Sorted(NamedTuple):
  """The product for rows [M, D] sorted by expert, with `group_sizes_E` rows for each.

  At least `block` rows that belong to no expert must follow.
  """

  group_sizes_E: Array
  num_rows: int  # M, static
  parts: int = 1
  row_bits: Array | None = None
  block: int = BLOCK  # see `moe_jax.ops.grouped_matmul`

  def __call__(self, rows_MX: Array, w_EXY: Array) -> Array:
    return grouped_matmul(rows_MX, w_EXY, self.group_sizes_E, self.block)

  def per_row(self, values_EX: Array) -> Array:
    dtype, expert_M = values_EX.dtype, jnp.minimum(self._expert_M(), values_EX.shape[0] - 1)
    if not jnp.issubdtype(dtype, jnp.floating):
      return values_EX[expert_M]
    # The gradient is a sum over the rows of an expert, and a sum of ones in bfloat16 ends at 256.
    return values_EX.astype(jnp.promote_types(dtype, jnp.float32))[expert_M].astype(dtype)

  def row_tiles(self, rows: Array, size: int) -> tuple[Array, int]:
    del rows
    # Rows without an expert come last, as those of one more.
    sizes = jnp.concatenate([self.group_sizes_E, jnp.array([self.num_rows], self.group_sizes_E.dtype)])
    before = lambda sizes: jnp.cumsum(sizes) - sizes
    expert_M = self._expert_M()
    tile_M = (
      before(-(-sizes // size))[expert_M] + (jnp.arange(self.num_rows) - before(sizes)[expert_M]) // size
    )
    return tile_M, -(-self.num_rows // size) + self.group_sizes_E.shape[0] + 1

  def _expert_M(self) -> Array:
    """The expert of each row, E for a row without."""
    return jnp.searchsorted(jnp.cumsum(self.group_sizes_E), jnp.arange(self.num_rows), side="right")

  def hidden(self, rows: Array) -> Array:
    return rows

  def ffn(self, activation: Activation, rows: Array, w_in: Sequence[Array], w_out_EFD: Array) -> Array:
    return grouped_ffn(activation, rows, tuple(w_in), w_out_EFD, self.group_sizes_E, self.block)


class Wrapper:
  """A base class for products that change another product. By itself it changes nothing."""

  def __init__(self, product: Product):
    self.product, self.parts, self.row_bits = product, product.parts, product.row_bits

  def __call__(self, rows: Array, w_EXY: Array) -> Array:
    return self.product(rows, w_EXY)

  def per_row(self, values_EX: Array) -> Array:
    return self.product.per_row(values_EX)

  def row_tiles(self, rows: Array, size: int) -> tuple[Array, int]:
    return self.product.row_tiles(rows, size)

  def hidden(self, rows: Array) -> Array:
    return self.product.hidden(rows)

  def ffn(self, activation: Activation, rows: Array, w_in: Sequence[Array], w_out_EFD: Array) -> Array:
    return self.product.ffn(activation, rows, w_in, w_out_EFD)


class PartOfSum(Wrapper):
  """A product whose output is one of `parts` terms of a sum. The caller adds them."""

  def __init__(self, product: Product, parts: int):
    super().__init__(product)
    self.parts = parts


class WithRowBits(Wrapper):
  """A product with random bits for its rows."""

  def __init__(self, product: Product, row_bits: Array):
    super().__init__(product)
    self.row_bits = row_bits


Axes = tuple[str | None, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experts:
  """E experts as dispatchers call them: `experts(rows, product)`, [.., D] -> [.., D].

  A dispatcher that spreads experts over devices gives each device its part of the weights, and calls the
  experts that the device has. The output of a row without a token may be any finite number, because its
  combine weight is zero.
  """

  weights: tuple[Array, ...]  # weights whose first axis is named "expert" are split by expert
  axes: tuple[Axes, ...] = dataclasses.field(metadata={"static": True})  # the logical axes of each weight
  compute: Callable[[tuple[Array, ...], Array, Product], Array] = dataclasses.field(metadata={"static": True})

  def __call__(self, rows: Array, product: Product) -> Array:
    return self.compute(self.weights, rows, product)

  @property
  def num_experts(self) -> int:
    """The number of experts whose weights are here: E, or fewer on one of several devices."""
    return next(w.shape[0] for w, axes in zip(self.weights, self.axes) if axes[:1] == ("expert",))


_SHIFTS = (0, 8, 16, 24)  # of the bytes of 32 bits


def with_row_bits(x: Array, bits: Array, experts: Experts) -> tuple[Array, Experts]:
  """Attaches random bits to tokens, so that experts can read them under any dispatcher.

  The bits are four more columns of one byte each, because dispatchers move rows of numbers. Integers below
  256 are exact in every float type, also after a product with ones and zeros.

  Args:
    x: [.., D].
    bits: uint32 [..].
    experts: experts that read `Product.row_bits`.

  Returns:
    x with further columns, [.., D + 4], and experts for such rows. The last four columns of their output are
    zeros.
  """
  bytes_ = jnp.stack([(bits >> shift) & 0xFF for shift in _SHIFTS], axis=-1)

  def compute(weights: tuple[Array, ...], rows: Array, product: Product) -> Array:
    tag = jax.lax.stop_gradient(rows[..., -len(_SHIFTS) :]).astype(jnp.uint32)
    row_bits = sum(tag[..., i] << shift for i, shift in enumerate(_SHIFTS))
    y = experts.compute(weights, rows[..., : -len(_SHIFTS)], WithRowBits(product, row_bits))
    return jnp.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, len(_SHIFTS))])

  return jnp.concatenate([x, bytes_.astype(x.dtype)], axis=-1), dataclasses.replace(experts, compute=compute)


def swiglu(gate: Array, up: Array) -> Array:
  """silu(gate) * up (2002.05202)."""
  return jax.nn.silu(gate) * up


def gated_experts(w_gate_EDF: Array, w_up_EDF: Array, w_down_EFD: Array) -> Experts:
  """Returns SwiGLU experts made of plain arrays: `(silu(x Wg) * (x Wu)) Wd`."""
  into, out = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
  return Experts((w_gate_EDF, w_up_EDF, w_down_EFD), (into, into, out), _gated)


def _gated(weights: tuple[Array, ...], rows: Array, product: Product) -> Array:
  return product.ffn(swiglu, rows, weights[:2], weights[2])
