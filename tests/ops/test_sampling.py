"""The next token: which can be drawn, how often, and that a draw does not depend on the rest of the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.sampling import next_token

LOGITS_V = np.log(np.array([0.1, 0.4, 0.05, 0.25, 0.2], np.float32))
DRAWS = 4000
KEY_B = jax.random.split(jax.random.key(0), DRAWS)


def allowed(probs_V, top_k, top_p):
  """The set of tokens that can be drawn, by going down the list."""
  order = sorted(range(len(probs_V)), key=lambda v: -probs_V[v])[: top_k or len(probs_V)]
  mass, total = 0.0, sum(probs_V[v] for v in order)
  kept = []
  for v in order:
    if mass >= top_p:
      break
    kept.append(v)
    mass += probs_V[v] / total
  return kept


@pytest.mark.parametrize(
  "temperature, top_k, top_p",
  [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 0, 0.7), (1.0, 4, 0.8), (0.7, 9, 0.01), (1.0, 1, 1.0)],
)
def test_tokens_are_drawn_as_often_as_their_probabilities_say(temperature, top_k, top_p):
  probs_V = np.exp(LOGITS_V / temperature) / np.exp(LOGITS_V / temperature).sum()
  kept = allowed(probs_V, top_k, top_p)
  expected_V = np.array([probs_V[v] if v in kept else 0 for v in range(5)])
  expected_V /= expected_V.sum()
  nucleus = {} if top_p == 1 else {"top_p": top_p}
  draw = jax.jit(functools.partial(next_token, top_k=top_k))
  found = draw(jnp.broadcast_to(LOGITS_V, (DRAWS, 5)), KEY_B, temperature, **nucleus)
  counts_V = np.bincount(found, minlength=5) / DRAWS
  np.testing.assert_array_equal(counts_V[expected_V == 0], 0)
  np.testing.assert_allclose(counts_V, expected_V, atol=4 * 0.5 / DRAWS**0.5)  # 4 standard deviations


def test_without_a_temperature_it_is_the_most_likely():
  found = next_token(jnp.stack([LOGITS_V, LOGITS_V[::-1]]), KEY_B[:2], None, top_k=3)
  assert found.tolist() == [1, 3] and found.dtype == jnp.int32


@pytest.mark.parametrize("temperature", [1e-30, 1e-37, 1.2e-38])
def test_a_small_temperature_leaves_the_most_likely(temperature):
  """Logits that are divided by it would not be finite."""
  logits = jnp.stack([LOGITS_V, 90 * LOGITS_V[::-1], -1000 + LOGITS_V])
  for limits in ({}, {"top_k": 4}, {"top_p": 0.9}, {"top_k": 4, "top_p": 0.9}):
    assert next_token(logits, KEY_B[:3], temperature, **limits).tolist() == [1, 3, 1]


def test_the_largest_temperature_draws_from_all():
  found = next_token(jnp.broadcast_to(LOGITS_V, (DRAWS, 5)), KEY_B, 3e38)
  np.testing.assert_allclose(np.bincount(found, minlength=5) / DRAWS, 0.2, atol=4 * 0.5 / DRAWS**0.5)


def test_a_draw_is_that_of_its_key():
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32)
  whole = next_token(logits, KEY_B[:6], 1.0, top_p=0.9)
  parts = [next_token(logits[i : i + 1], KEY_B[i : i + 1], 1.0, top_p=0.9)[0] for i in range(6)]
  assert whole.tolist() == [int(token) for token in parts] and len(set(whole.tolist())) > 1
