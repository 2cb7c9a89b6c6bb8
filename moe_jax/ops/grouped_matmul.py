"""Rows sorted by expert, times the matrix of their expert."""

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.types import Array

BLOCK = 128  # rows of one expert that are multiplied at once on CPU


@jax.custom_vjp
def grouped_matmul(rows_MX: Array, w_EXY: Array, group_sizes_E: Array) -> Array:
  """`out[m] = rows[m] @ w[e]` for the `group_sizes_E[e]` rows of expert e, which follow those of e-1.

  Rows beyond the last group give zero and have zero gradient. On CPU this is a loop over blocks of rows,
  since XLA:CPU multiplies every expert with every row for `ragged_dot`.
  """
  return _forward(rows_MX, w_EXY, group_sizes_E)


def _fwd(rows_MX, w_EXY, group_sizes_E):
  return _forward(rows_MX, w_EXY, group_sizes_E), (rows_MX, w_EXY, group_sizes_E)


def _bwd(saved, d_out_MY):
  rows_MX, w_EXY, group_sizes_E = saved
  d_rows = lax.platform_dependent(d_out_MY, w_EXY, group_sizes_E, cpu=_block_rows_t, default=_ragged_rows_t)
  d_w = lax.platform_dependent(rows_MX, d_out_MY, group_sizes_E, cpu=_block_w, default=_ragged_w)
  return d_rows.astype(rows_MX.dtype), d_w.astype(w_EXY.dtype), None


grouped_matmul.defvjp(_fwd, _bwd)


def _forward(rows_MX, w_EXY, group_sizes_E):
  return lax.platform_dependent(rows_MX, w_EXY, group_sizes_E, cpu=_block_rows, default=_ragged_rows)


def _mask_tail(out_MY, group_sizes_E):
  in_group_M = jnp.arange(out_MY.shape[0]) < jnp.sum(group_sizes_E)
  return jnp.where(in_group_M[:, None], out_MY, 0)


def _ragged_rows(rows_MX, w_EXY, group_sizes_E):
  return _mask_tail(lax.ragged_dot(rows_MX, w_EXY, group_sizes_E), group_sizes_E)


def _ragged_rows_t(d_out_MY, w_EXY, group_sizes_E):
  return _ragged_rows(d_out_MY, w_EXY.swapaxes(1, 2), group_sizes_E)


def _ragged_w(rows_MX, d_out_MY, group_sizes_E):
  dims = lax.RaggedDotDimensionNumbers(
    (((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
  )
  rows_MX, d_out_MY = _mask_tail(rows_MX, group_sizes_E), _mask_tail(d_out_MY, group_sizes_E)
  return lax.ragged_dot_general(rows_MX, d_out_MY, group_sizes_E, dims)


def _block_rows(rows_MX, w_EXY, group_sizes_E):
  return _blocks(rows_MX, w_EXY, group_sizes_E, (((1,), (0,)), ((), ())), w_EXY.shape[2])


def _block_rows_t(d_out_MY, w_EXY, group_sizes_E):
  return _blocks(d_out_MY, w_EXY, group_sizes_E, (((1,), (1,)), ((), ())), w_EXY.shape[1])


def _pad(rows_MX):
  return jnp.pad(rows_MX, ((0, BLOCK), (0, 0)))


def _blocks(rows_MX, w_EXY, group_sizes_E, dims, width):
  """Block by block of every expert's rows. A last block reaches into the next expert's rows, which
  that expert's own blocks then overwrite."""
  rows = _pad(rows_MX)
  out = jnp.zeros((rows.shape[0], width), jnp.result_type(rows_MX, w_EXY))
  start_E = jnp.cumsum(group_sizes_E) - group_sizes_E

  def expert(e, out):
    w_XY = w_EXY[e]

    def block(b, out):
      start = start_E[e] + b * BLOCK
      x = lax.dynamic_slice_in_dim(rows, start, BLOCK)
      y = lax.dot_general(x, w_XY, dims)
      return lax.dynamic_update_slice_in_dim(out, y, start, 0)

    return lax.fori_loop(0, (group_sizes_E[e] + BLOCK - 1) // BLOCK, block, out)

  out = lax.fori_loop(0, w_EXY.shape[0], expert, out)
  return _mask_tail(out, group_sizes_E)[: rows_MX.shape[0]]


def _block_w(rows_MX, d_out_MY, group_sizes_E):
  """Sums `rows^T d_out` over up to 4 blocks at once: every sum reads and writes all of d_w[e], so that
  one block at a time takes 1.3 times as long. (For the rows, XLA:CPU would copy them per `switch`.)"""
  rows, d_out = _pad(rows_MX), _pad(d_out_MY)
  start_E = jnp.cumsum(group_sizes_E) - group_sizes_E
  at_once = min(4, rows_MX.shape[0] // BLOCK + 1)

  def product(num_blocks, start, left):
    own = (jnp.arange(num_blocks * BLOCK) < left)[:, None]
    x, dy = (jnp.where(own, lax.dynamic_slice_in_dim(a, start, own.shape[0]), 0) for a in (rows, d_out))
    return lax.dot_general(x, dy, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

  def expert(e, d_w_EXY):
    num_blocks = (group_sizes_E[e] + BLOCK - 1) // BLOCK

    def step(i, d_w):
      done = i * at_once * BLOCK
      branches = [lambda d_w, start, left, n=n: d_w + product(n + 1, start, left) for n in range(at_once)]
      which = jnp.minimum(num_blocks - i * at_once, at_once) - 1
      return lax.switch(which, branches, d_w, start_E[e] + done, group_sizes_E[e] - done)

    d_w = jnp.zeros((rows.shape[1], d_out.shape[1]), jnp.float32)
    d_w = lax.fori_loop(0, (num_blocks + at_once - 1) // at_once, step, d_w)
    return d_w_EXY.at[e].set(d_w.astype(d_w_EXY.dtype))

  d_w_EXY = jnp.zeros((group_sizes_E.shape[0], rows.shape[1], d_out.shape[1]), rows_MX.dtype)
  return lax.fori_loop(0, group_sizes_E.shape[0], expert, d_w_EXY)
