"""Both forms of the grouped product, and of a network of them, against a loop over experts: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops import grouped_matmul as module
from moe_jax.ops.grouped_matmul import BLOCK, grouped_ffn, grouped_matmul

D, F, D_OUT, ROWS = 5, 6, 7, 300  # nothing needs as many columns out as in


def gated(gate, up):
  return jax.nn.silu(gate) * up


def reference(activation, rows, w_in, w_out, sizes):
  """A loop over experts, which JAX differentiates."""
  out, start = [], 0
  for e, size in enumerate(np.asarray(sizes)):
    own = rows[start : start + size]
    hidden = activation(*(jnp.dot(own, w[e], precision="highest") for w in w_in))
    out.append(jnp.dot(hidden, w_out[e], precision="highest"))
    start += size
  return jnp.concatenate([*out, jnp.zeros((len(rows) - start, w_out.shape[2]), rows.dtype)])


def blocks(activation, rows, w_in, w_out, sizes, d_out):
  out, pullback = jax.vjp(lambda *args: grouped_ffn(activation, *args, sizes), rows, w_in, w_out)
  return out, *pullback(d_out)


def small_blocks(activation, rows, w_in, w_out, sizes, d_out):
  """As for few tokens. Without a gradient nothing else is kept, and the values are the same."""
  out, pullback = jax.vjp(lambda *args: grouped_ffn(activation, *args, sizes, 64), rows, w_in, w_out)
  alone = grouped_ffn(activation, rows, w_in, w_out, sizes, 64)
  return jnp.where(jnp.all(jnp.abs(alone - out) < 1e-5), out, jnp.nan), *pullback(d_out)


def ragged(activation, rows, w_in, w_out, sizes, d_out):
  """What other backends run."""
  out, inner = module._ragged_forward(activation, rows, w_in, w_out, sizes)
  return out, *module._ragged_backward(activation, rows, w_in, w_out, sizes, inner, d_out)


FORMS = {f.__name__: jax.jit(f, static_argnums=0) for f in (blocks, small_blocks, ragged)}
SIZES = {
  "even": [100, 100, 100],
  "empty_experts": [0, 300, 0],
  "rows_left_over": [7, 0, 150],
  "all_left_over": [0, 0, 0],
  "exact_blocks": [128, 128, 44],
  "last_full": [1, 1, 298],
}


def make_inputs(num_in, dtype=jnp.float32):
  shapes = [(ROWS + BLOCK, D), (3, F, D_OUT), (ROWS + BLOCK, D_OUT), *[(3, D, F)] * num_in]
  keys = jax.random.split(jax.random.key(0), len(shapes))
  rows, w_out, d_out, *w_in = (jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes))
  return rows, tuple(w_in), w_out, d_out


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("activation", [gated, jax.nn.relu], ids=["gated", "relu"])
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loop(form, activation, case):
  sizes = jnp.asarray(SIZES[case], jnp.int32)
  rows, w_in, w_out, d_out = make_inputs(2 if activation is gated else 1)
  got = FORMS[form](activation, rows, w_in, w_out, sizes, d_out)
  want, pullback = jax.vjp(lambda *args: reference(activation, *args, sizes), rows, w_in, w_out)
  for path, got_one, want_one in zip(
    ("out", "d_rows", "d_in", "d_out"), got, (want, *pullback(d_out)), strict=True
  ):
    jax.tree.map(
      lambda a, b, p=path: np.testing.assert_allclose(a, b, atol=2e-4, err_msg=p), got_one, want_one
    )


@pytest.mark.parametrize("form", FORMS)
def test_left_over_rows_reach_nothing(form):
  """Not even where they are not numbers."""
  rows, w_in, w_out, d_out = make_inputs(2)
  sizes = jnp.asarray([7, 0, 150], jnp.int32)
  clean = FORMS[form](gated, rows, w_in, w_out, sizes, d_out)
  rows, d_out = rows.at[157:].set(jnp.nan), d_out.at[157:].set(jnp.nan)
  got = FORMS[form](gated, rows, w_in, w_out, sizes, d_out)
  jax.tree.map(np.testing.assert_array_equal, got, clean)
  for by_row in got[:2]:
    assert not np.any(by_row[157:])


def test_an_infinite_row_reaches_no_other_expert():
  rows, w_in, w_out, d_out = make_inputs(2)
  sizes = jnp.asarray([100, 100, 100], jnp.int32)
  clean = FORMS["blocks"](gated, rows, w_in, w_out, sizes, d_out)
  got = FORMS["blocks"](gated, rows.at[110].set(jnp.inf), w_in, w_out, sizes, d_out)
  for e in (0, 2):
    own = slice(100 * e, 100 * (e + 1))
    for i in (0, 1):
      np.testing.assert_array_equal(got[i][own], clean[i][own])
    jax.tree.map(lambda a, b, e=e: np.testing.assert_array_equal(a[e], b[e]), got[2:], clean[2:])


def test_bfloat16_sums_in_float32():
  sizes = jnp.asarray([300, 0, 0], jnp.int32)
  rows, w_in, w_out, d_out = jax.tree.map(jnp.ones_like, make_inputs(1, jnp.bfloat16))
  results = FORMS["blocks"](lambda up: up, rows, w_in, w_out, sizes, d_out)
  assert {leaf.dtype for leaf in jax.tree.leaves(results)} == {jnp.dtype(jnp.bfloat16)}
  # Bfloat16 sums of ones and fives stop at 256 and 1024.
  np.testing.assert_array_equal(results[2][0][0], jnp.bfloat16(300 * D_OUT))
  np.testing.assert_array_equal(results[3][0], jnp.bfloat16(300 * D))


def one_product_in_blocks(rows, w, sizes, d_out):
  out, pullback = jax.vjp(lambda *args: grouped_matmul(*args, sizes), rows, w)
  return out, *pullback(d_out)


def one_product_ragged(rows, w, sizes, d_out):
  """What other backends run."""
  d_rows = module._ragged_rows(d_out, w.swapaxes(1, 2), sizes)
  return module._ragged_rows(rows, w, sizes), d_rows, module._ragged_w(rows, d_out, sizes)


@pytest.mark.parametrize("form", [one_product_in_blocks, one_product_ragged], ids=lambda form: form.__name__)
def test_one_product_equals_the_loop_and_left_over_rows_reach_nothing(form):
  rows, (w,), _, _ = make_inputs(1)
  d_out, run = make_inputs(1)[0][:, :1] * jnp.arange(1.0, F + 1)[None], jax.jit(form)
  for sizes in SIZES.values():
    total = sum(sizes)
    hide = lambda x, total=total: x.at[total:].set(jnp.nan)
    got = run(hide(rows), w, jnp.asarray(sizes, jnp.int32), hide(d_out))
    ends = np.cumsum([0, *sizes])
    want = [np.zeros((len(rows), F)), np.zeros(rows.shape), np.zeros(w.shape)]
    for e, own in enumerate(map(slice, ends, ends[1:])):
      x, d, w_XY = (np.asarray(a, np.float64) for a in (rows[own], d_out[own], w[e]))
      want[0][own], want[1][own], want[2][e] = x @ w_XY, d @ w_XY.T, x.T @ d
    for a, b in zip(got, want, strict=True):
      np.testing.assert_allclose(a, b, atol=1e-6 * max(np.abs(b).max(), 300))
