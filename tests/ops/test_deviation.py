"""The squared deviation: zero at balance, without a gradient in its printed form, with a gradient on importance."""

import jax
import numpy as np
import pytest

from moe_jax.ops.balancing.losses import SCOPES
from moe_jax.types import BatchRouting
from tests.ops.balancer_laws import MASK_BL, logits_of, loss_of, routing_of, selected
from tests.ops.balancer_rows import GROUP, B, E, K, L
from tests.reference import deepseek_losses as further


def loss_and_gradient(spec, logits_BLE, mask_BL=MASK_BL):
  def loss(x):
    return loss_of(spec, routing_of("softmax", x, mask_BL, selected("softmax", logits_BLE, mask_BL)))

  value, gradient = jax.value_and_grad(loss)(logits_BLE)
  return float(value), np.asarray(gradient)


def routing_with(logits_LE, k):
  logits_BLE = logits_LE[None].astype(np.float32)
  mask_BL = np.ones(logits_BLE.shape[:2], bool)
  chosen_BLE = selected("softmax", logits_BLE, mask_BL, k)
  return BatchRouting(logits_BLE, jax.nn.log_softmax(logits_BLE), chosen_BLE, mask_BL, len(logits_LE), k)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_printed_form_has_a_value_and_no_gradient(scope):
  spec = f"squared_deviation_loss:1:scope={scope}"
  printed, no_gradient = loss_and_gradient(spec + ":of=load", logits_of())
  assert printed > 0.01
  np.testing.assert_array_equal(no_gradient, 0)
  assert np.abs(loss_and_gradient(spec + ":of=importance", logits_of())[1]).max() > 1e-3


@pytest.mark.parametrize("scope", SCOPES)
def test_values_of_both_forms(scope):
  size = {"sequence": L, "group": GROUP}.get(scope, B * L)
  selected_TE = selected("softmax", logits_of(), MASK_BL).reshape(-1, E)
  total = 0.0
  for start in range(0, B * L, size):
    counts_E = selected_TE[start : start + size].sum(axis=0)
    total += counts_E.sum() / K * further.deviation_of_counts(counts_E)
  of_load = loss_and_gradient(f"squared_deviation_loss:3:load:{scope}", logits_of())[0]
  np.testing.assert_allclose(of_load, 3 * total / MASK_BL.sum(), rtol=1e-5)
  want = 3 * further.deviation_of_importance(logits_of().astype(float), MASK_BL, size, "softmax")
  of_importance = loss_and_gradient(f"squared_deviation_loss:3:importance:{scope}", logits_of())[0]
  np.testing.assert_allclose(of_importance, want, rtol=1e-5)


@pytest.mark.parametrize(("num_experts", "k"), [(2, 1), (4, 1), (4, 2), (8, 1), (8, 4), (8, 8)])
def test_zero_at_balance_for_every_k(num_experts, k):
  """Also for K > 1, because the divisor is the number of assignments. With tokens the target would be K/E."""
  base_E = np.linspace(2, -2, num_experts)
  routing = routing_with(np.stack([np.roll(base_E, t) for t in range(8)]), k)
  for of in ("load", "importance"):
    np.testing.assert_allclose(loss_of(f"squared_deviation_loss:1:{of}", routing), 0, atol=1e-6)
  if k == 1:
    return
  per_token_E = routing.selected_BLE[0].mean(axis=0)
  assert np.sum((per_token_E - 1 / num_experts) ** 2) > 0.1
  np.testing.assert_allclose(np.sum((per_token_E - k / num_experts) ** 2), 0, atol=1e-6)


def test_importance_does_not_see_what_is_chosen():
  """All tokens take expert 0 by a hair."""
  logits_LE = np.zeros((8, 4))
  logits_LE[:, 0] = 1e-4
  routing = routing_with(logits_LE, 1)
  assert loss_of("squared_deviation_loss:1:importance", routing) < 1e-6
  np.testing.assert_allclose(
    loss_of("squared_deviation_loss:1:load", routing), 3 / 4**2 + (3 / 4) ** 2, rtol=1e-6
  )


def test_importance_is_switch_loss_less_one_with_f_replaced_by_p():
  """E * sum((p - 1/E)^2) = E * sum(p * p) - 1: half its gradient is that of switch_loss with f = p."""
  routing = routing_of("softmax", logits_of(), np.ones((B, L), bool), np.ones((B, L, E), np.float32))
  mean_E = np.asarray(jax.nn.softmax(logits_of()).mean(axis=(0, 1)))
  as_load_BLE = np.broadcast_to(mean_E, (B, L, E))
  switch = loss_of("switch_loss:1:micro_batch", routing._replace(selected_BLE=as_load_BLE))
  np.testing.assert_allclose(
    loss_of("squared_deviation_loss:1:scope=micro_batch", routing), switch - 1, rtol=1e-5
  )
