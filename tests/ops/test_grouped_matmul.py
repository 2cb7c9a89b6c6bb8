"""Both forms of the grouped matmul against a loop over experts, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops import grouped_matmul as module
from moe_jax.ops.grouped_matmul import grouped_matmul

X, Y = 5, 7


def reference(rows, w, sizes, d_out):
  """float64 loop: out, d_rows, d_w."""
  rows, w, d_out = (np.asarray(a, np.float64) for a in (rows, w, d_out))
  out, d_rows, d_w = np.zeros((len(rows), w.shape[2])), np.zeros_like(rows), np.zeros_like(w)
  start = 0
  for e, size in enumerate(np.asarray(sizes)):
    own = slice(start, start + size)
    out[own], d_rows[own], d_w[e] = rows[own] @ w[e], d_out[own] @ w[e].T, rows[own].T @ d_out[own]
    start += size
  return out, d_rows, d_w


@jax.jit
def value_and_grads(rows, w, sizes, d_out):
  out, pullback = jax.vjp(lambda rows, w: grouped_matmul(rows, w, sizes), rows, w)
  return out, *pullback(d_out)


SIZES = {
  "even": [100, 100, 100],
  "empty_experts": [0, 300, 0],
  "rows_left_over": [7, 0, 150],
  "all_left_over": [0, 0, 0],
  "exact_blocks": [128, 128, 44],
  "last_full": [1, 1, 298],
}


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("form", ["blocks", "ragged_dot"])
def test_equals_the_loop(form, case, monkeypatch):
  sizes = jnp.asarray(SIZES[case], jnp.int32)
  keys = jax.random.split(jax.random.key(0), 3)
  rows, w, d_out = (jax.random.normal(k, s) for k, s in zip(keys, [(300, X), (3, X, Y), (300, Y)]))
  if form == "blocks":
    got = value_and_grads(rows, w, sizes, d_out)
  else:  # what other backends run
    got = (
      module._ragged_rows(rows, w, sizes),
      module._ragged_rows_t(d_out, w, sizes),
      module._ragged_w(rows, d_out, sizes),
    )
  for got_one, want, name in zip(got, reference(rows, w, sizes, d_out), ("out", "d_rows", "d_w")):
    np.testing.assert_allclose(got_one, want, atol=2e-4, err_msg=name)


def test_left_over_rows_reach_nothing():
  """Not even where they are not numbers."""
  sizes = jnp.asarray([7, 0, 150], jnp.int32)
  rows, w, d_out = (
    jnp.ones((300, X)).at[157:].set(jnp.nan),
    jnp.ones((3, X, Y)),
    jnp.ones((300, Y)).at[157:].set(jnp.nan),
  )
  for got in value_and_grads(rows, w, sizes, d_out):
    assert np.all(np.isfinite(got))


def test_bfloat16_sums_in_float32():
  sizes = jnp.asarray([300, 0, 0], jnp.int32)
  rows, w, d_out = (jnp.ones(s, jnp.bfloat16) for s in ((300, X), (3, X, Y), (300, Y)))
  out, d_rows, d_w = value_and_grads(rows, w, sizes, d_out)
  assert out.dtype == d_rows.dtype == d_w.dtype == jnp.bfloat16
  np.testing.assert_array_equal(d_w[0], jnp.bfloat16(300))  # a bfloat16 sum of ones stops at 256
