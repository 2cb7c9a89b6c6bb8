"""ReMoE (2412.14711): ReLU routing, and the loss that brings it to K experts per token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import InputError
from moe_jax.ops.balancing import make_balancer
from moe_jax.ops.routing import make_choice
from moe_jax.types import StepStats
from tests.ops.choosing import route
from tests.ops.skewed import route_batch
from tests.reference import relu_routing as reference

E, K = 8, 2


@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
def test_the_coefficient_follows_the_sparsity_of_whole_steps(scope):
  balancer = make_balancer(f"remoe_loss:0.5:factor=1.5:scope={scope}")
  state, want, update = balancer.init(E), 0.5, jax.jit(balancer.update)
  for active in (8, 4, 1, 1, 1, 3):
    counts_E = np.full(E, active * 10 / E, np.float32)
    state = update(state, ({"experts": counts_E, "slots": np.float32(K * 10)},))
    want = reference.next_coefficient(want, counts_E, 10, K, 1.5)
    np.testing.assert_allclose(state, (want,), rtol=1e-6)
  for _ in range(400):
    state = update(state, ({"experts": np.ones(E, np.float32), "slots": np.float32(0)},))
  assert np.isfinite(state[0])
  (rest,) = update(state, ({"experts": np.zeros(E, np.float32), "slots": np.float32(0)},))
  assert rest == state[0]


def test_descent_brings_tokens_to_k_experts_evenly():
  """Gradient descent of the logits' weights on this loss alone, from half of the experts and a skewed start."""
  x_BLD = np.random.default_rng(0).normal(size=(4, 32, 16)).astype(np.float32)
  w_DE = np.random.default_rng(1).normal(size=(16, E)).astype(np.float32) / 4
  x_BLD[..., 0] = 1  # so that a row of the weights is a threshold for each expert
  mask_BL = np.ones((4, 32), bool)
  balancer = make_balancer("remoe_loss:0.001")

  def step(carry, _):
    w_DE, state = carry

    def loss(w_DE):
      routing = route_batch("remoe", x_BLD @ w_DE, mask_BL)
      observed = balancer.observe(state, routing)
      return sum(balancer.losses(state, routing, StepStats(observed, observed)).values()), observed

    gradient_DE, observed = jax.grad(loss, has_aux=True)(w_DE)
    return (w_DE - 0.05 * gradient_DE, balancer.update(state, observed)), observed[0][
      "experts"
    ] / mask_BL.size

  _, load = jax.lax.scan(step, (w_DE, balancer.init(E)), length=300)
  per_token = np.asarray(load.sum(axis=-1))
  assert abs(per_token[0] - E / 2) < 0.7 and per_token[-100:].max() < K + 0.5
  assert load[-1].max() / load[-1].mean() < load[0].max() / load[0].mean() * 2


def test_the_layer_is_continuous_where_an_expert_sets_in():
  choice = make_choice("remoe", 3, 1)
  weight_of = lambda x: route(choice, jnp.array([[x, 1.0, -1.0]])).assignment.weight_A[0]
  assert weight_of(-1e-3) == 0 and weight_of(1e-3) == pytest.approx(1e-3)


def test_a_token_may_use_no_expert():
  logits_TE = -jnp.ones((2, 4))
  routing = route(make_choice("remoe", 4, 1), logits_TE)
  assert not routing.assignment.valid_A.any()
  assert np.isfinite(jax.nn.softmax(routing.log_scores_TE)).all()


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (
      lambda: make_choice("remoe:max_experts=1", 4, 2),
      "between num_experts_per_token=2 and num_experts=4, got 1",
    ),
    (lambda: make_choice("remoe:max_experts=5", 4, 2), "got 5"),
    (lambda: make_balancer("remoe_loss:0"), "start must be above 0"),
    (lambda: make_balancer("remoe_loss:factor=1"), "factor must be above 1"),
    (lambda: make_balancer("remoe_loss:scope=text"), "scope must be one of"),
  ],
)
def test_wrong_options_are_errors(make, message):
  with pytest.raises(InputError, match=message):
    make()
