"""Applies each expert's feed-forward network to its own rows, which are sorted by expert."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.types import Array

BLOCK = 128  # the rows of one expert that the CPU multiplies at once, if there are as many
_ROWS_BY_MATRIX, _ROWS_BY_TRANSPOSED, _SUM_OVER_ROWS = (
  (((rows_axis,), (other_axis,)), ((), ())) for rows_axis, other_axis in ((1, 0), (1, 1), (0, 0))
)


def block_of(num_tokens: int) -> int:
  """Returns the rows to multiply at once where no expert has more than `num_tokens`, as in decoding."""
  return min(BLOCK, max(8, 1 << (num_tokens - 1).bit_length()))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def grouped_ffn(
  activation: Callable[..., Array],
  rows_MD: Array,
  w_in: tuple[Array, ...],
  w_out_EFD: Array,
  group_sizes_E: Array,
  block: int = BLOCK,
) -> Array:
  """Returns `out[m] = activation(*(rows[m] @ w[e] for w in w_in)) @ w_out[e]`, where e is the expert of row m.

  Expert e has `group_sizes_E[e]` rows, which follow those of expert e-1. The arrays of `w_in` are [E, D, F].
  `activation` must map zeros to zeros.

  At least `block` rows must follow the last group, because the CPU's last block extends into them. A caller that
  gathers the rows can append them at no cost. Their output and their gradient are zero.

  On CPU, this is a loop over blocks of `block` rows, because XLA:CPU multiplies every expert with every row for
  `ragged_dot`. Each block passes through the whole network, and in the backward pass through all of its products.
  With one loop per product instead, the [M, F] results go through memory, and a training step takes 1.2 times as
  long.
  """
  args = rows_MD, w_in, w_out_EFD, group_sizes_E
  cpu = functools.partial(_block_forward, activation, block, False)
  default = functools.partial(_ragged_forward, activation)
  return lax.platform_dependent(
    *args, cpu=lambda *args: cpu(*args)[0], default=lambda *args: default(*args)[0]
  )


def _fwd(activation, rows_MD, w_in, w_out_EFD, group_sizes_E, block):
  args = rows_MD, w_in, w_out_EFD, group_sizes_E
  cpu = functools.partial(_block_forward, activation, block, True)
  default = functools.partial(_ragged_forward, activation)
  out_MD, inner = lax.platform_dependent(*args, cpu=cpu, default=default)
  return out_MD, (*args, inner)


def _bwd(activation, block, saved, d_out_MD):
  rows_MD, w_in, w_out_EFD, _, _ = saved
  cpu = functools.partial(_block_backward, activation, block)
  default = functools.partial(_ragged_backward, activation)
  gradients = lax.platform_dependent(*saved, d_out_MD, cpu=cpu, default=default)
  d_rows, d_in, d_out = jax.tree.map(lambda d, x: d.astype(x.dtype), gradients, (rows_MD, w_in, w_out_EFD))
  return d_rows, d_in, d_out, None


grouped_ffn.defvjp(_fwd, _bwd)


def _ragged_rows(rows_MX, w_EXY, group_sizes_E):
  in_group_M = jnp.arange(rows_MX.shape[0]) < jnp.sum(group_sizes_E)
  return jnp.where(in_group_M[:, None], lax.ragged_dot(rows_MX, w_EXY, group_sizes_E), 0)


def _ragged_w(rows_MX, d_out_MY, group_sizes_E):
  dims = lax.RaggedDotDimensionNumbers(
    (((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
  )
  in_group_M1 = (jnp.arange(rows_MX.shape[0]) < jnp.sum(group_sizes_E))[:, None]
  rows_MX, d_out_MY = jnp.where(in_group_M1, rows_MX, 0), jnp.where(in_group_M1, d_out_MY, 0)
  return lax.ragged_dot_general(rows_MX, d_out_MY, group_sizes_E, dims)


def _ragged_forward(activation, rows_MD, w_in, w_out_EFD, group_sizes_E):
  inner = tuple(_ragged_rows(rows_MD, w, group_sizes_E) for w in w_in)
  return _ragged_rows(activation(*inner), w_out_EFD, group_sizes_E), inner


def _ragged_backward(activation, rows_MD, w_in, w_out_EFD, group_sizes_E, inner, d_out_MD):
  hidden_MF, pullback = jax.vjp(activation, *inner)
  d_inner = pullback(_ragged_rows(d_out_MD, w_out_EFD.swapaxes(1, 2), group_sizes_E))
  d_rows_MD = sum(_ragged_rows(d, w.swapaxes(1, 2), group_sizes_E) for d, w in zip(d_inner, w_in))
  d_in = tuple(_ragged_w(rows_MD, d, group_sizes_E) for d in d_inner)
  return d_rows_MD, d_in, _ragged_w(hidden_MF, d_out_MD, group_sizes_E)


def _write(outs, blocks, start):
  return tuple(
    lax.dynamic_update_slice_in_dim(out, block.astype(out.dtype), start, 0)
    for out, block in zip(outs, blocks)
  )


def _clear_tail(out_MD, group_sizes_E, block):
  """Sets the rows to zero that the last block wrote beyond the last group."""
  zeros = jnp.zeros((block, out_MD.shape[1]), out_MD.dtype)
  return lax.dynamic_update_slice_in_dim(out_MD, zeros, jnp.sum(group_sizes_E), 0)


def _for_blocks(size, start, num_rows, block, carry):
  """Runs `carry = block(first row, rows left, carry)` for every block of `num_rows` of one expert's rows.

  The last block extends into the next expert's rows. That expert overwrites the results there.
  """
  step = lambda b, carry: block(start + b * num_rows, size - b * num_rows, carry)
  return lax.fori_loop(0, (size + num_rows - 1) // num_rows, step, carry)


def _block_forward(activation, size, keep_inner, rows_MD, w_in, w_out_EFD, group_sizes_E):
  """(the output, and what enters the activation if it is kept)."""
  start_E = jnp.cumsum(group_sizes_E) - group_sizes_E

  def expert(e, outs):
    own_w_in, w_out_FD = jax.tree.map(lambda w: w[e], (w_in, w_out_EFD))

    def block(start, left, outs):
      del left
      x = lax.dynamic_slice_in_dim(rows_MD, start, size)
      inner = tuple(lax.dot_general(x, w, _ROWS_BY_MATRIX) for w in own_w_in)
      out = lax.dot_general(activation(*inner), w_out_FD, _ROWS_BY_MATRIX)
      return _write(outs, (out, *inner) if keep_inner else (out,), start)

    return _for_blocks(group_sizes_E[e], start_E[e], size, block, outs)

  num_rows, (num_experts, hidden, width) = rows_MD.shape[0], w_out_EFD.shape
  dtype = jnp.result_type(rows_MD, *w_in)
  outs = (
    jnp.zeros((num_rows, width), jnp.result_type(dtype, w_out_EFD)),
    *(jnp.zeros((num_rows, hidden), dtype) for _ in w_in if keep_inner),
  )
  out_MD, *inner = lax.fori_loop(0, num_experts, expert, outs)
  return _clear_tail(out_MD, group_sizes_E, size), tuple(inner)


def _block_backward(activation, size, rows_MD, w_in, w_out_EFD, group_sizes_E, inner, d_out_MD):
  start_E = jnp.cumsum(group_sizes_E) - group_sizes_E

  def sum_over_rows(x, dy):
    return lax.dot_general(x, dy, _SUM_OVER_ROWS, preferred_element_type=jnp.float32)

  def expert(e, carry):
    d_rows_MD, *d_w = carry
    own_w_in, w_out_FD = jax.tree.map(lambda w: w[e], (w_in, w_out_EFD))

    def block(start, left, carry):
      d_rows_MD, *d_own = carry
      own_X1 = (jnp.arange(size) < left)[:, None]
      x, dy, *z = (
        jnp.where(own_X1, lax.dynamic_slice_in_dim(a, start, size), 0) for a in (rows_MD, d_out_MD, *inner)
      )
      hidden, pullback = jax.vjp(activation, *z)
      d_z = pullback(lax.dot_general(dy, w_out_FD, _ROWS_BY_TRANSPOSED).astype(hidden.dtype))
      dx = sum(lax.dot_general(d, w, _ROWS_BY_TRANSPOSED) for d, w in zip(d_z, own_w_in))
      sums = *(sum_over_rows(x, d) for d in d_z), sum_over_rows(hidden, dy)
      return *_write([d_rows_MD], [dx], start), *(d + more for d, more in zip(d_own, sums))

    zeros = (jnp.zeros(w.shape, jnp.float32) for w in (*own_w_in, w_out_FD))
    d_rows_MD, *d_own = _for_blocks(group_sizes_E[e], start_E[e], size, block, (d_rows_MD, *zeros))
    return d_rows_MD, *(all_d.at[e].set(d.astype(all_d.dtype)) for all_d, d in zip(d_w, d_own))

  zeros = tuple(jnp.zeros_like(a) for a in (rows_MD, *w_in, w_out_EFD))
  d_rows_MD, *d_in, d_w_out = lax.fori_loop(0, w_out_EFD.shape[0], expert, zeros)
  return _clear_tail(d_rows_MD, group_sizes_E, size), tuple(d_in), d_w_out


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(rows_MX: Array, w_EXY: Array, group_sizes_E: Array, block: int = BLOCK) -> Array:
  """`rows[m] @ w[e]` for the `group_sizes_E[e]` rows of expert e, which follow those of e-1; [M, X] -> [M, Y].

  As in `grouped_ffn`, at least `block` rows must follow the last group; they give zero.
  """
  cpu = functools.partial(_block_rows, _ROWS_BY_MATRIX, block)
  return lax.platform_dependent(rows_MX, w_EXY, group_sizes_E, cpu=cpu, default=_ragged_rows)


def _matmul_fwd(rows_MX, w_EXY, group_sizes_E, block):
  return grouped_matmul(rows_MX, w_EXY, group_sizes_E, block), (rows_MX, w_EXY, group_sizes_E)


def _matmul_bwd(block, saved, d_out_MY):
  rows_MX, w_EXY, group_sizes_E = saved
  d_rows = functools.partial(_block_rows, _ROWS_BY_TRANSPOSED, block)
  d_w = lambda *inputs: _block_w(block, *inputs).astype(w_EXY.dtype)
  ragged = lambda d_out, w, sizes: _ragged_rows(d_out, w.swapaxes(1, 2), sizes)
  d_rows_MX = lax.platform_dependent(d_out_MY, w_EXY, group_sizes_E, cpu=d_rows, default=ragged)
  ragged_w = lambda *inputs: _ragged_w(*inputs).astype(w_EXY.dtype)
  d_w_EXY = lax.platform_dependent(rows_MX, d_out_MY, group_sizes_E, cpu=d_w, default=ragged_w)
  return d_rows_MX.astype(rows_MX.dtype), d_w_EXY, None


grouped_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _block_rows(dimensions, size, rows_MX, w_EXY, group_sizes_E):
  start_E = jnp.cumsum(group_sizes_E) - group_sizes_E

  def expert(e, out_MY):
    def block(start, left, out_MY):
      del left
      x = lax.dynamic_slice_in_dim(rows_MX, start, size)
      return _write([out_MY], [lax.dot_general(x, w_EXY[e], dimensions)], start)[0]

    return _for_blocks(group_sizes_E[e], start_E[e], size, block, out_MY)

  width = w_EXY.shape[2 if dimensions == _ROWS_BY_MATRIX else 1]
  out_MY = jnp.zeros((rows_MX.shape[0], width), jnp.result_type(rows_MX, w_EXY))
  return _clear_tail(lax.fori_loop(0, w_EXY.shape[0], expert, out_MY), group_sizes_E, size)


def _block_w(size, rows_MX, d_out_MY, group_sizes_E):
  """The gradient of the matrices: sums over the rows of each expert."""
  start_E = jnp.cumsum(group_sizes_E) - group_sizes_E
  shape = (rows_MX.shape[1], d_out_MY.shape[1])

  def expert(e, d_w_EXY):
    def block(start, left, d_w):
      own_X1 = (jnp.arange(size) < left)[:, None]
      x, dy = (jnp.where(own_X1, lax.dynamic_slice_in_dim(a, start, size), 0) for a in (rows_MX, d_out_MY))
      return d_w + lax.dot_general(x, dy, _SUM_OVER_ROWS, preferred_element_type=jnp.float32)

    d_w = _for_blocks(group_sizes_E[e], start_E[e], size, block, jnp.zeros(shape, jnp.float32))
    return d_w_EXY.at[e].set(d_w)

  return lax.fori_loop(0, group_sizes_E.shape[0], expert, jnp.zeros((group_sizes_E.shape[0], *shape)))
