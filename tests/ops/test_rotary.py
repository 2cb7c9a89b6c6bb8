"""Rotary positions: pairs, a part of the head, positions of its own for each sequence, and YaRN."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.rotary import Rotary, Yarn
from tests.reference import mixers

LENGTH, HEAD_DIM, THETA = 7, 8, 100.0
POSITION_XL = jnp.arange(LENGTH)[None]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [HEAD_DIM, 4, 0])
def test_pairs_turn_and_the_rest_stays(rng, dim, interleaved):
  x = rng.normal(size=(2, LENGTH, 3, HEAD_DIM))
  found = Rotary(dim, THETA, interleaved)(jnp.asarray(x, jnp.float32), POSITION_XL)
  expected = mixers.rotate(x[..., :dim], mixers.frequencies(dim, THETA), interleaved)
  np.testing.assert_allclose(found, np.concatenate([expected, x[..., dim:]], axis=-1), rtol=1e-5, atol=1e-5)


def test_each_sequence_may_have_positions_of_its_own(rng):
  x = jnp.asarray(rng.normal(size=(1, LENGTH, 3, HEAD_DIM)), jnp.float32)
  rotary = Rotary(HEAD_DIM, THETA)
  both = rotary(jnp.concatenate([x, x]), jnp.stack([jnp.arange(LENGTH), jnp.arange(LENGTH) + 5]))
  shifted = rotary(jnp.concatenate([x[:, :1]] * 5 + [x], axis=1), jnp.arange(LENGTH + 5)[None])[:, 5:]
  np.testing.assert_allclose(both, jnp.concatenate([rotary(x, POSITION_XL), shifted]), rtol=1e-6)


def test_yarn_keeps_fast_pairs_and_slows_slow_ones():
  """Pairs that turn more than beta_fast times in the original length, and less than beta_slow times (2309.00071)."""
  dim, theta, yarn = 64, 10_000.0, Yarn(40.0, 4096)
  plain = mixers.frequencies(dim, theta)
  turns = 4096 * plain / (2 * np.pi)
  found = np.asarray(Rotary(dim, theta, yarn=yarn).frequencies())
  np.testing.assert_allclose(found[turns > 32 * 1.4], plain[turns > 32 * 1.4], rtol=1e-6)  # 1.4: a pair more
  np.testing.assert_allclose(found[turns < 1 / 1.4], plain[turns < 1 / 1.4] / 40, rtol=1e-6)
  between = (turns < 32) & (turns > 1)
  assert between.sum() > 5 and np.all(np.diff((found / plain)[between]) < 0)


@pytest.mark.parametrize("truncate, low, high", [(True, 1, 5), (False, 1.3, 4.7)])
def test_yarn_by_hand(truncate, low, high):
  """8 pairs, theta = 4^8: pair i turns 4^(4.7 - i) times, so the ramp goes from pair 1.3 to 4.7."""
  yarn = Yarn(2.0, round(2 * np.pi * 4**4.7), beta_fast=4**3.4, beta_slow=1.0, truncate=truncate)
  slowed = np.array([min(max((i - low) / (high - low), 0), 1) for i in range(8)])
  expected = 4.0 ** -np.arange(8) * (1 - slowed / 2)
  np.testing.assert_allclose(Rotary(16, 4.0**8, yarn=yarn).frequencies(), expected, rtol=1e-4)


@pytest.mark.parametrize(
  "mscale, all_dim, magnitude, score_scale",
  [
    (1.0, 0.0, 0.1 * np.log(32) + 1, 1.0),  # gpt-oss
    (1.0, 1.0, 1.0, (0.1 * np.log(32) + 1) ** 2),  # V3
    (0.5, 1.0, (0.05 * np.log(32) + 1) / (0.1 * np.log(32) + 1), (0.1 * np.log(32) + 1) ** 2),
  ],
)
def test_yarn_scales_what_is_rotated_and_the_scores(rng, mscale, all_dim, magnitude, score_scale):
  rotary = Rotary(HEAD_DIM, THETA, yarn=Yarn(32.0, 64, mscale=mscale, mscale_all_dim=all_dim))
  x = rng.normal(size=(2, LENGTH, 3, HEAD_DIM)).astype(np.float32)
  found = np.asarray(rotary(jnp.asarray(x), POSITION_XL))
  np.testing.assert_allclose(
    np.linalg.norm(found, axis=-1), magnitude * np.linalg.norm(x, axis=-1), rtol=1e-5
  )
  np.testing.assert_allclose(rotary.score_scale, score_scale, rtol=1e-6)
