"""SMEBU (2602.17004): a bias whose moves vanish at balance."""

import jax
import numpy as np
import pytest

from moe_jax.errors import InputError
from moe_jax.ops.balancing import make_balancer
from tests.ops.skewed import skewed_run
from tests.reference import bias as reference


@pytest.mark.parametrize(
  ("spec", "options"), [("smebu", (5e-4, 2, 0.5)), ("smebu:0.25:kappa=0.7:beta=0.9", (0.25, 0.7, 0.9))]
)
def test_the_bias_of_every_step_equals_the_loop(spec, options):
  balancer = make_balancer(spec)
  update, state = jax.jit(balancer.update), balancer.init(5)
  counts = [np.random.default_rng(seed).integers(0, 3 * 10**seed, size=5) for seed in range(5)]
  counts += [0 * counts[0], 0 * counts[0] + 7]  # no tokens, and balance: only momentum is left
  want = reference.smebu(counts, *options)
  for counts_E, want_E in zip(counts, want, strict=True):
    state = update(state, (counts_E.astype(np.float32),))
    np.testing.assert_allclose(balancer.bias(state), want_E, rtol=1e-5, atol=1e-6 * options[0])


def test_a_skewed_router_comes_to_rest_where_the_sign_goes_on():
  smooth, bias = skewed_run("smebu:0.02")
  sign, _ = skewed_run("loss_free_bias:0.02")
  assert smooth[0] > 1 and smooth[-50:].max() < 0.1 < 0.2 < sign[-50:].max()
  assert np.abs(np.diff(bias, axis=0)).max() <= 2 * 0.02
  np.testing.assert_allclose(bias.mean(axis=1), 0, atol=1e-6)


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ("smebu:-1", "balancer smebu: rate must be 0 or more, got -1.0"),
    ("smebu:kappa=0", "balancer smebu: kappa must be above 0, got 0.0"),
    ("smebu:beta=1", r"balancer smebu: beta must be in \[0, 1\), got 1.0"),
  ],
)
def test_wrong_options_are_errors(spec, message):
  with pytest.raises(InputError, match=message):
    make_balancer(spec)
