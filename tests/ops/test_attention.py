"""Attention in blocks equals plain attention: causal, in a window, or to everything that is no padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.attention import attend

LENGTH, HEADS, KV_HEADS, HEAD_DIM = 24, 4, 2, 8
ALL_BL = np.ones((2, LENGTH), bool)
MASK_BL = ALL_BL.copy()
MASK_BL[1, 17:] = False
FORMS = {
  "causal": {},
  "window": {"window": 5},
  "bidirectional": {"causal": False, "mask_BL": MASK_BL},
  "bidirectional window": {"causal": False, "mask_BL": MASK_BL, "window": 5},
}


def reference(query, key, value, causal=True, window=LENGTH, mask_BL=ALL_BL):
  """Loops over positions and heads, in float64."""
  out = np.zeros(query.shape)
  for b, q, n in np.ndindex(query.shape[0], LENGTH, HEADS):
    x = n // (HEADS // KV_HEADS)
    last = q if causal else q + window - 1
    seen = [k for k in range(LENGTH) if mask_BL[b, k] and q - window < k <= last]
    if not seen:  # a hidden position, of which nobody reads what comes out
      continue
    scores = key[b, seen, x] @ query[b, q, n] / np.sqrt(HEAD_DIM)
    weights = np.exp(scores - scores.max())
    out[b, q, n] = weights @ value[b, seen, x] / weights.sum()
  return out


@pytest.fixture
def arrays(rng):
  shapes = [(2, LENGTH, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", [24, 8, 7])  # 7: the last block is shorter
def test_values_are_those_of_the_definition(arrays, block, form):
  given = FORMS[form]
  out = np.array(attend(*map(jnp.asarray, arrays), block=block, **given))
  expected = reference(*(x.astype(np.float64) for x in arrays), **given)
  hidden = ~given.get("mask_BL", ALL_BL)
  assert np.isfinite(out).all()
  out[hidden] = expected[hidden] = 0
  np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_definition_whatever_the_blocks(arrays, rng, form):
  """Along a random direction of each, and with padding that holds anything."""
  given = FORMS[form]
  mask_BL = given.get("mask_BL", ALL_BL)
  cotangent = rng.normal(size=arrays[0].shape).astype(np.float32) * mask_BL[..., None, None]
  directions = [rng.normal(size=x.shape) for x in arrays]

  @functools.partial(jax.jit, static_argnums=0)
  def gradients(block, *args):
    return jax.grad(lambda *args: jnp.sum(cotangent * attend(*args, block=block, **given)), (0, 1, 2))(*args)

  found = {block: gradients(block, *map(jnp.asarray, arrays)) for block in (7, 8, LENGTH)}
  side = lambda i, s: [
    x + s * 1e-6 * d if i == j else x * 1.0 for j, (x, d) in enumerate(zip(arrays64, directions))
  ]
  arrays64 = [x.astype(np.float64) for x in arrays]
  for i in range(3):
    above, below = (np.sum(reference(*side(i, s), **given) * cotangent) for s in (1, -1))
    for by_block in found.values():
      np.testing.assert_allclose(np.sum(by_block[i] * directions[i]), (above - below) / 2e-6, rtol=1e-3)
      np.testing.assert_allclose(by_block[i], found[LENGTH][i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["causal", "window"])
def test_no_scores_of_the_whole_sequence_are_kept(arrays, form):
  """With the backward pass, the largest array holds one block's scores."""

  def largest(block):
    loss = lambda *args: jnp.sum(attend(*args, block=block, **FORMS[form]))
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
