"""Attention in blocks is attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.attention import attend

LENGTH, HEADS, KV_HEADS, HEAD_DIM = 24, 4, 2, 8


def reference(query, key, value):
  """Loops over positions and heads, in float64."""
  out = np.zeros(query.shape)
  for b, q, n in np.ndindex(query.shape[0], LENGTH, HEADS):
    x = n // (HEADS // KV_HEADS)
    scores = key[b, : q + 1, x] @ query[b, q, n] / np.sqrt(HEAD_DIM)
    weights = np.exp(scores - scores.max())
    out[b, q, n] = weights @ value[b, : q + 1, x] / weights.sum()
  return out


@pytest.fixture
def arrays(rng):
  shapes = [(2, LENGTH, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("block", [24, 8, 7])  # 7: the last block is shorter
def test_values_are_those_of_the_definition(arrays, block):
  out = attend(*map(jnp.asarray, arrays), block=block)
  expected = reference(*(x.astype(np.float64) for x in arrays))
  np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)


def test_gradients_do_not_depend_on_the_blocks(arrays, rng):
  cotangent = rng.normal(size=arrays[0].shape).astype(np.float32)

  def gradients(block):
    loss = lambda *args: jnp.sum(cotangent * attend(*args, block=block))
    return jax.jit(jax.grad(loss, (0, 1, 2)))(*map(jnp.asarray, arrays))

  for ours, whole in zip(gradients(8), gradients(LENGTH)):
    np.testing.assert_allclose(ours, whole, rtol=1e-4, atol=1e-5)


def test_no_scores_of_the_whole_sequence_are_kept(arrays):
  """With the backward pass, the largest array holds one block's scores."""

  def largest(block):
    loss = lambda *args: jnp.sum(attend(*args, block=block))
    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*map(jnp.asarray, arrays))
    return max(size for size in _sizes(jaxpr.jaxpr))

  whole = 2 * HEADS * LENGTH * LENGTH
  assert largest(LENGTH) >= whole
  assert largest(6) <= whole // 2


def _sizes(jaxpr):
  for equation in jaxpr.eqns:
    yield from (v.aval.size for v in equation.outvars if hasattr(v.aval, "size"))
    for value in equation.params.values():
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from _sizes(inner)
