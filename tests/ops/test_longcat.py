"""LongCat-Flash's bias (2509.01322): it sets how many feed-forward experts a token uses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import InputError
from moe_jax.ops.balancing import make_balancer
from moe_jax.ops.balancing.longcat import Counts
from moe_jax.ops.routing import make_choice, to_batch
from moe_jax.ops.routing.common import in_groups
from moe_jax.types import RouterContext
from tests.reference import bias as reference

N, Z, K = 6, 3, 3


@pytest.mark.parametrize(
  ("option", "ffn_per_token"), [("", K * N / (N + Z)), (":ffn_experts_per_token=1.5", 1.5)]
)
def test_a_step_equals_the_loop(option, ffn_per_token):
  balancer = make_balancer(f"longcat_bias:0.25:zero_computation={Z}{option}")
  (start_E,) = (np.linspace(-1, 1, N + Z).astype(np.float32),)
  for tokens in (0, 7, 1000):
    counts_E = np.random.default_rng(tokens).multinomial(K * tokens, np.ones(N + Z) / (N + Z))
    of_step = Counts(*(np.asarray(x, np.float32) for x in (counts_E, tokens, K * tokens)))
    (state,) = balancer.update((start_E,), (of_step,))
    want_E = start_E + reference.longcat(counts_E, tokens, K, ffn_per_token, Z, 0.25)
    np.testing.assert_allclose(state, want_E, rtol=1e-6, atol=1e-6)


@functools.cache
def load_of(ffn_per_token, num_steps=600):
  """The tokens of each expert divided by all tokens, at the last step of a router that prefers some experts."""
  noise_BLE = np.random.default_rng(0).normal(size=(4, 64, N + Z)).astype(np.float32)
  logits_BLE = noise_BLE + np.linspace(1, -1, N + Z).astype(np.float32)
  balancer = make_balancer(f"longcat_bias:0.05:ffn_experts_per_token={ffn_per_token}:zero_computation={Z}")
  choice = make_choice(f"longcat_topk:identities={Z}", N, K)

  def step(state, _):
    context = RouterContext(np.ones((4, 64), bool), balancer.bias(state))
    (routing, _) = in_groups(choice.choose, logits_BLE, context=context)
    of_step = balancer.observe(state, to_batch(routing, 4, 64, K))
    return balancer.update(state, of_step), of_step[0].counts_E / of_step[0].tokens

  run = jax.jit(lambda state: jax.lax.scan(step, state, length=num_steps))
  (bias_E,), load = run(balancer.init(N + Z))
  np.testing.assert_array_equal(bias_E[N:], 0)
  return np.asarray(load[-1])


@pytest.mark.parametrize("ffn_per_token", [1.0, 2.5])
def test_tokens_use_as_many_feed_forward_experts_as_asked(ffn_per_token):
  load_E = load_of(ffn_per_token)
  np.testing.assert_allclose(load_E[:N], ffn_per_token / N, rtol=0.1)
  np.testing.assert_allclose(load_E[:N].sum(), ffn_per_token, rtol=0.02)


def test_identities_are_copies_without_renormalised_weights():
  """The choice is that of MoE++ with copies only, and its weights are `scale` times those."""
  logits_TE = jnp.asarray(np.random.default_rng(0).normal(size=(12, N + Z)), jnp.float32)
  context = RouterContext(jnp.arange(12) != 5, jnp.linspace(-0.03, 0.03, N + Z))
  specs = (f"longcat_topk:identities={Z}", f"moe_plus_plus:zeros=0:copies={Z}:constants=0")
  (routing, weight_TZ), (plain, plain_TZ) = (
    make_choice(spec, N, K).choose(logits_TE, context) for spec in specs
  )
  np.testing.assert_allclose(weight_TZ, 6 * plain_TZ, rtol=1e-6)
  np.testing.assert_array_equal(weight_TZ[5], 0)
  assert (weight_TZ > 0).any(axis=0).all()
  np.testing.assert_array_equal(routing.assignment.expert_A, plain.assignment.expert_A)
  np.testing.assert_allclose(routing.assignment.weight_A, 6 * plain.assignment.weight_A, rtol=1e-6)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: make_choice("longcat_topk:identities=0", N, K), "identities must be 1 or more, got 0"),
    (lambda: make_choice("longcat_topk:scale=0", N, K), "scale must be above 0"),
    (lambda: make_balancer("longcat_bias:zero_computation=0"), "zero_computation must be 1 or more, got 0"),
    (
      lambda: make_balancer("longcat_bias:ffn_experts_per_token=-1"),
      "ffn_experts_per_token must be 0 or more",
    ),
    (lambda: make_balancer("longcat_bias").init(8), "leaves no feed-forward expert among the 8"),
    (lambda: load_of(3.5), "ffn_experts_per_token=3.5 is more than the 3 experts of a token"),
  ],
)
def test_wrong_options_are_errors(make, message):
  with pytest.raises(InputError, match=message):
    make()
