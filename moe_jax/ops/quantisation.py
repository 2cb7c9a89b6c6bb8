"""Matrices in few bits: codes, and a scale for each block. Every format rounds to its nearest value."""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError, unknown_name
from moe_jax.types import Array

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the values of FP4, without their sign
_MIDDLES = tuple((a + b) / 2 for a, b in itertools.pairwise(E2M1))


@dataclasses.dataclass(frozen=True)
class Format:
  """A way to store numbers in few bits.

  largest: the largest value of a code, which the largest number of a block is scaled to.
  encode: scaled numbers -> codes, uint8 or int8.
  decode: the inverse, in float32.
  packed: whether a code takes 4 bits, so that a byte holds those of two rows.
  block: rows and columns that share a scale; 0: all rows.
  grouped: whether the rows of a block may be chosen.
  power_of_two: whether scales are powers of two, which are stored as exponents.
  """

  largest: float
  encode: Callable[[Array], Array]
  decode: Callable[[Array], Array]
  packed: bool
  block: tuple[int, int]
  grouped: bool = False
  power_of_two: bool = False


def _integer(largest: int) -> Callable[[Array], Array]:
  return lambda x: jnp.clip(jnp.round(x), -largest, largest).astype(jnp.int8)


def _nibble(x: Array) -> Array:
  """A signed number of 4 bits in the low half of a byte."""
  return jax.lax.bitcast_convert_type(_integer(7)(x), jnp.uint8) & 15


def _signed(nibble: Array) -> Array:
  return ((nibble.astype(jnp.int32) ^ 8) - 8).astype(jnp.float32)


def _to_e4m3(x: Array) -> Array:
  return jax.lax.bitcast_convert_type(jnp.clip(x, -448, 448).astype(jnp.float8_e4m3fn), jnp.uint8)


def _from_e4m3(codes: Array) -> Array:
  return jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)


def _to_e2m1(x: Array) -> Array:
  """The nearest value; halfway, the one whose last bit is 0."""
  middles = jnp.array(_MIDDLES)
  up = jnp.searchsorted(middles, jnp.abs(x), side="right")
  down = jnp.searchsorted(middles, jnp.abs(x), side="left")
  return (jnp.where(up % 2 == 0, up, down) | (jnp.signbit(x) * 8)).astype(jnp.uint8)


def _from_e2m1(codes: Array) -> Array:
  return jnp.array(E2M1)[codes & 7] * jnp.where(codes & 8, -1.0, 1.0)


FORMATS = {
  # symmetric integers, a scale per output channel or per group of its rows
  "int8": Format(127, _integer(127), lambda codes: codes.astype(jnp.float32), False, (0, 1), grouped=True),
  "int4": Format(7, _nibble, _signed, True, (0, 1), grouped=True),
  # E4M3 in blocks of 128 x 128 with float32 scales (DeepSeek-V3, 2412.19437, section 3.3)
  "fp8": Format(448, _to_e4m3, _from_e4m3, False, (128, 128)),
  # E2M1 in blocks of 32 with E8M0 scales (OCP Microscaling Formats 1.0). Scales are rounded up, so that no
  # number saturates; the rule of the specification lets numbers above 6 become 6.
  "mxfp4": Format(6, _to_e2m1, _from_e2m1, True, (32, 1), power_of_two=True),
}


def format_of(name: str, group: int = 0) -> Format:
  """Returns a format by name.

  Args:
    name: a key of `FORMATS`.
    group: rows that share a scale, for integers; 0: all.

  Raises:
    InputError: if the name is unknown, or the format has no groups of this size.
  """
  if name not in FORMATS:
    raise unknown_name("format", name, FORMATS)
  found = FORMATS[name]
  if group and not found.grouped:
    raise InputError(f"format {name}: has blocks of {found.block[0]} rows, got group={group}; leave it at 0")
  if group < 0:
    raise InputError(f"format {name}: group is a number of rows, or 0 for all, got {group}")
  return dataclasses.replace(found, block=(group, 1)) if group else found


def quantise(w_EXY: Array, format: Format) -> tuple[Array, Array]:
  """Returns (codes, scales) of E matrices.

  Args:
    w_EXY: float.
    format: see `format_of`.

  Returns:
    codes [E, X, Y], or [E, ceil(X / 2), Y] if packed, and scales [E, blocks of rows, blocks of columns]: float32, or
    uint8 exponents with a bias of 127.
  """
  w_EXY = jnp.asarray(w_EXY, jnp.float32)
  rows, columns = _block(w_EXY.shape, format)
  amax = _blocks_max(jnp.abs(w_EXY), rows, columns)
  scales = jnp.where(amax > 0, amax / format.largest, 1.0)
  if format.power_of_two:
    exponent = jnp.clip(jnp.ceil(jnp.log2(scales)), -127, 127)
    # log2 may be off by one rounding at powers of two
    exponent += (amax > format.largest * jnp.exp2(exponent)).astype(jnp.float32)
    scales = (exponent + 127).astype(jnp.uint8)
  codes = format.encode(w_EXY / _expanded(_as_float(scales, format), rows, columns, w_EXY.shape))
  return (_packed(codes) if format.packed else codes), scales


def dequantise(codes: Array, scales: Array, format: Format, num_rows: int) -> Array:
  """Returns E matrices in float32 [E, X, Y].

  Args:
    codes, scales: of `quantise`, or of the same part of both.
    format: as there.
    num_rows: X of the whole matrix.
  """
  if format.packed:
    codes = jnp.stack([codes & 15, codes >> 4], axis=2).reshape(codes.shape[0], -1, codes.shape[2])[
      :, :num_rows
    ]
  rows, columns = _block((0, num_rows, codes.shape[-1]), format)
  return format.decode(codes) * _expanded(_as_float(scales, format), rows, columns, codes.shape)


def _block(shape: tuple[int, ...], format: Format) -> tuple[int, int]:
  rows, columns = format.block
  return rows or shape[1], columns


def _as_float(scales: Array, format: Format) -> Array:
  if format.power_of_two:
    return jnp.exp2(scales.astype(jnp.float32) - 127)
  return scales.astype(jnp.float32)


def _blocks_max(x_EXY: Array, rows: int, columns: int) -> Array:
  e, x, y = x_EXY.shape
  more_rows, more_columns = -x % rows, -y % columns
  padded = jnp.pad(x_EXY, ((0, 0), (0, more_rows), (0, more_columns)))
  return padded.reshape(e, (x + more_rows) // rows, rows, (y + more_columns) // columns, columns).max(
    axis=(2, 4)
  )


def _expanded(scales: Array, rows: int, columns: int, shape: tuple[int, ...]) -> Array:
  return jnp.repeat(jnp.repeat(scales, rows, axis=1), columns, axis=2)[:, : shape[1], : shape[2]]


def _packed(codes_EXY: Array) -> Array:
  codes_EXY = jnp.pad(codes_EXY, ((0, 0), (0, codes_EXY.shape[1] % 2), (0, 0)))
  return codes_EXY[:, ::2] | (codes_EXY[:, 1::2] << 4)
