"""Attention in blocks equals plain attention: causal, in a window, or to everything that is no padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.attention import attend, attend_cached
from tests.reference import mixers

LENGTH, HEADS, KV_HEADS, HEAD_DIM = 24, 4, 2, 8
ALL_BL = np.ones((2, LENGTH), bool)
MASK_BL = ALL_BL.copy()
MASK_BL[1, 17:] = False
FORMS = {
  "causal": {},
  "window": {"window": 5},
  "bidirectional": {"causal": False, "mask_BL": MASK_BL},
  "bidirectional window": {"causal": False, "mask_BL": MASK_BL, "window": 5},
  "sinks": {"sink_N": np.array([3.0, -1.0, 0.5, 60.0], np.float32), "scale": 0.7},
  "sinks in a window": {
    "sink_N": np.array([3.0, -1.0, 0.5, 1.0], np.float32),
    "window": 5,
    "mask_BL": MASK_BL,
  },
}


def reference(query, key, value, **given):
  return mixers.attention(query, key, value, **{"scale": HEAD_DIM**-0.5} | given)


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


def test_values_may_have_another_width(arrays):
  """As in latent attention. The gradients of this form are those of the sinks' test."""
  query, key, value = arrays
  found = attend(query, key, jnp.asarray(value[..., :3]), block=7)
  np.testing.assert_allclose(found, reference(query, key, value[..., :3]), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("form", ["causal", "window", "sinks"])
def test_queries_behind_a_cache_see_what_they_would_see_without(arrays, form):
  """Keys in any order, with columns that hold nothing yet, behind padding on the left."""
  query, key, value = arrays
  given, pad_B = FORMS[form], np.array([0, 3])
  mask_BL = np.arange(LENGTH) >= pad_B[:, None]
  expected = reference(query, key, value, mask_BL=mask_BL, **given)[:, -2:]
  order = np.random.default_rng(1).permutation(LENGTH + 2)
  columns = np.concatenate(
    [np.arange(LENGTH), [-1, LENGTH]]
  )  # of the past, which holds none, and of the future
  extended = lambda x: np.concatenate([x, np.full_like(x[:, :2], 9.0)], axis=1)[:, order]
  found = attend_cached(
    query[:, -2:], extended(key), extended(value), column_L=np.arange(LENGTH - 2, LENGTH), column_X=columns[order],
    pad_B=pad_B, **given,
  )  # fmt: skip
  np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_definition_whatever_the_blocks(arrays, rng, form):
  """Along a random direction of each, and with padding that holds anything."""
  given = dict(FORMS[form])
  mask_BL = given.get("mask_BL", ALL_BL)
  names = ("query_BLNH", "key_BLNH", "value_BLNH")
  if "sink_N" in given:
    arrays, names = [*arrays, given.pop("sink_N")], (*names, "sink_N")
  cotangent = rng.normal(size=arrays[0].shape).astype(np.float32) * mask_BL[..., None, None]
  directions = [rng.normal(size=x.shape) for x in arrays]
  which = tuple(range(len(arrays)))

  @functools.partial(jax.jit, static_argnums=0)
  def gradients(block, *args):
    loss = lambda *args: jnp.sum(cotangent * attend(**dict(zip(names, args)), block=block, **given))
    return jax.grad(loss, which)(*args)

  found = {block: gradients(block, *map(jnp.asarray, arrays)) for block in (7, 8, LENGTH)}
  side = lambda i, s: [
    x + s * 1e-6 * d if i == j else x * 1.0 for j, (x, d) in enumerate(zip(arrays64, directions))
  ]
  arrays64 = [x.astype(np.float64) for x in arrays]
  value_of = lambda query, key, value, sink_N=None: np.sum(
    reference(query, key, value, sink_N=sink_N, **given) * cotangent
  )
  for i in which:
    above, below = (value_of(*side(i, s)) for s in (1, -1))
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
