"""Lightning attention in chunks equals the quadratic formula: values, gradients, states, and the rates of decay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.lightning import decay_rates, linear_attention
from tests.reference import mixers

LENGTH, HEADS, HEAD_DIM = 11, 3, 4
RATE_N = np.array([0.9, 0.2, 0.0], np.float32)


@pytest.fixture
def arrays(rng):
  return [rng.normal(size=(2, LENGTH, HEADS, HEAD_DIM)).astype(np.float32) for _ in range(3)]


@functools.partial(jax.jit, static_argnames="chunk")
def run(arrays, state=None, chunk=256):
  return linear_attention(*arrays, RATE_N, state, chunk=chunk)


@pytest.mark.parametrize(
  "chunk", [4, 11, 256, 1], ids=["shorter last chunk", "one", "longer", "single positions"]
)
def test_values_and_state_are_those_of_the_quadratic_formula(arrays, chunk):
  expected, expected_state = mixers.lightning(*(x.astype(np.float64) for x in arrays), RATE_N)
  found, state = run(arrays, chunk=chunk)
  np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
  np.testing.assert_allclose(state, expected_state, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("first", [1, 4, 6])
def test_a_sequence_may_be_cut_anywhere(arrays, first):
  whole, state_of_whole = run(arrays, chunk=4)
  begun, state = run([x[:, :first] for x in arrays], chunk=4)
  rest, state = run([x[:, first:] for x in arrays], state, chunk=4)
  np.testing.assert_allclose(np.concatenate([begun, rest], axis=1), whole, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(state, state_of_whole, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_quadratic_formula(arrays, rng):
  """Against differences along a random direction of each; the state counts, too."""
  cotangent = rng.normal(size=arrays[0].shape), rng.normal(size=(2, HEADS, HEAD_DIM, HEAD_DIM))

  @functools.partial(jax.jit, static_argnames="chunk")
  def gradients(arrays, chunk):
    loss = lambda arrays: sum(jnp.sum(c * x) for c, x in zip(cotangent, run(arrays, chunk=chunk)))
    return jax.grad(loss)(arrays)

  loss64 = lambda arrays: sum(np.sum(c * x) for c, x in zip(cotangent, mixers.lightning(*arrays, RATE_N)))
  arrays64 = [x.astype(np.float64) for x in arrays]
  directions = [rng.normal(size=x.shape) for x in arrays]
  found = {chunk: gradients(arrays, chunk) for chunk in (4, 256)}
  for i, direction in enumerate(directions):
    side = lambda s, i=i, direction=direction: [x + s * direction * (i == j) for j, x in enumerate(arrays64)]
    expected = (loss64(side(1e-6)) - loss64(side(-1e-6))) / 2e-6
    for by_chunk in found.values():
      np.testing.assert_allclose(np.sum(by_chunk[i] * direction), expected, rtol=1e-3)


def test_a_fast_decay_over_a_long_chunk_stays_finite(rng):
  arrays = [rng.normal(size=(1, 300, 1, 2)).astype(np.float32) for _ in range(3)]
  found, state = jax.jit(lambda arrays: linear_attention(*arrays, np.array([9.0], np.float32)))(arrays)
  np.testing.assert_allclose(found, mixers.lightning(*arrays, [9.0])[0], rtol=1e-4, atol=1e-5)
  assert np.isfinite(state).all()


def test_rates_of_decay_are_those_of_minimax():
  """80 layers and 64 heads, the last layer with a rate that a float32 could not get from 1 - l / (L - 1)."""
  for layer in (0, 1, 40, 78, 79):
    expected = [mixers.decay_rate(head, 64, layer, 80) for head in range(64)]
    np.testing.assert_allclose(decay_rates(64, layer, 80), expected, rtol=1e-5)
    np.testing.assert_allclose(
      jax.jit(decay_rates, static_argnums=(0, 2))(64, layer, 80), expected, rtol=1e-5
    )


@pytest.mark.parametrize("num_layers", [1, 3])
def test_behind_the_last_layer_rates_are_those_of_the_last_one(num_layers):
  """Modules of multi-token prediction have the layer numbers L, L + 1, ..., where the formula is negative."""
  expected = [mixers.decay_rate(head, 4, num_layers - 1, num_layers) for head in range(4)]
  for layer in (num_layers, num_layers + 1):
    np.testing.assert_allclose(decay_rates(4, layer, num_layers), expected, rtol=1e-5)
