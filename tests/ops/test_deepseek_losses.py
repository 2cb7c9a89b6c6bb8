"""DeepSeek's sequence, device and communication losses and ST-MoE's loss: how each differs from switch_loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.balancing import make_balancer
from moe_jax.ops.routing import make_choice, to_batch
from moe_jax.ops.routing.common import in_groups
from moe_jax.types import BatchRouting, RouterContext
from tests.ops.balancer_laws import MASK_BL, logits_of, loss_of, routing_of, selected
from tests.ops.balancer_rows import B, E, K, L
from tests.reference import balancing as reference
from tests.reference import deepseek_losses as further


def route_with_bias(router, logits_BLE, bias_E):
  context = RouterContext(MASK_BL, bias_E)
  routing = in_groups(make_choice(router, E, K).choose, logits_BLE, context=context)
  return to_batch(routing, B, L, K)


def chosen_by(experts_of_token, num_experts, k):
  """A routing of two sequences of 8 tokens that go to `experts_of_token(t)`, with equal scores among these and
  hardly any for the others."""
  selected_LE = np.zeros((8, num_experts), np.float32)
  for t in range(8):
    selected_LE[t, list(experts_of_token(t))] = 1
  selected_BLE = np.stack([selected_LE, selected_LE])
  logits_BLE = 60 * selected_BLE - 30
  return BatchRouting(
    logits_BLE,
    jax.nn.log_softmax(logits_BLE),
    selected_BLE,
    np.ones((2, 8), bool),
    8,
    num_experts_per_token=k,
  )


# --- sequence_loss ---


def test_sequence_loss_counts_by_scores_where_a_bias_moves_the_choice():
  logits_BLE, bias_E = logits_of(), np.array([-0.4, -0.2, 0.2, 0.4], np.float32)
  plain = route_with_bias("sigmoid_topk", logits_BLE, None)
  moved = route_with_bias("sigmoid_topk", logits_BLE, bias_E)
  assert (moved.selected_BLE != plain.selected_BLE).any(axis=-1).sum() > 5
  want = further.sequence_loss(logits_BLE.astype(float), MASK_BL, K, "sigmoid")
  np.testing.assert_allclose(loss_of("sequence_loss:1", moved), want, rtol=1e-5)
  np.testing.assert_allclose(loss_of("sequence_loss:1", plain), want, rtol=1e-5)
  # The other one is satisfied as soon as the bias has done the work; this one still asks for it.
  assert loss_of("switch_loss:1:sequence", moved) < want - 0.03
  np.testing.assert_allclose(loss_of("switch_loss:1:sequence", plain), want, rtol=1e-5)


def test_sequence_loss_does_not_read_the_choice_at_all():
  """Nor a limit on groups: f is over the K best of all experts."""
  routing = routing_of("sigmoid", logits_of(), MASK_BL, selected("sigmoid", logits_of(), MASK_BL))
  for other in (routing.selected_BLE[..., ::-1], jnp.zeros((B, L, E)), jnp.full((B, L, E), jnp.nan)):
    moved = routing._replace(selected_BLE=other)
    assert loss_of("sequence_loss:1", moved) == loss_of("sequence_loss:1", routing)


def test_default_weights_are_the_papers():
  routing = chosen_by(lambda t: [t], 8, 1)
  for spec, weight in (("sequence_loss", 1e-4), ("device_loss", 0.05), ("st_moe_loss", 0.01)):
    np.testing.assert_allclose(loss_of(spec, routing), weight, rtol=1e-5)
  every_third_device = chosen_by(lambda t: [t, (t + 1) % 8, (t + 2) % 8], 8, 3)
  np.testing.assert_allclose(loss_of("communication_loss", every_third_device), 0.02, rtol=1e-5)


# --- device_loss ---


@pytest.mark.parametrize("scope", ["sequence", "group", "micro_batch", "global_batch"])
def test_one_expert_per_device_is_switch_loss(scope):
  """Which is also DeepSeekMoE's expert-level loss (2401.06066, eq. 12-14): f_e = E / (K T) * count_e."""
  routing = routing_of("sigmoid", logits_of(), MASK_BL, selected("sigmoid", logits_of(), MASK_BL))
  value = lambda spec: jax.value_and_grad(
    lambda x: loss_of(spec, routing._replace(log_scores_BLE=jax.nn.log_sigmoid(x)))
  )(routing.logits_BLE)
  device, switch = value(f"device_loss:1:{E}:{scope}"), value(f"switch_loss:1:{scope}")
  np.testing.assert_allclose(device[0], switch[0], rtol=1e-6)
  np.testing.assert_allclose(device[1], switch[1], atol=1e-7)


def test_device_loss_is_blind_inside_a_device():
  """All tokens take the first expert of some device: devices are balanced, experts are not."""
  routing = chosen_by(lambda t: [2 * (t % 4)], 8, 1)
  np.testing.assert_allclose(loss_of("device_loss:1:devices=4", routing), 1, rtol=1e-5)
  np.testing.assert_allclose(loss_of("switch_loss:1:sequence", routing), 2, rtol=1e-5)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_device_loss_is_the_number_of_devices_when_one_has_all(devices):
  routing = chosen_by(lambda t: [t % 2], 8, 1)  # experts 0 and 1 share a device in all three cases
  np.testing.assert_allclose(loss_of(f"device_loss:1:{devices}", routing), devices, rtol=1e-5)


# --- communication_loss ---


def test_communication_loss_is_one_where_tokens_reach_m_devices_evenly():
  """Two experts on each of two neighbouring devices, of four."""
  routing = chosen_by(lambda t: [2 * t % 8, (2 * t + 1) % 8, (2 * t + 2) % 8, (2 * t + 3) % 8], 8, 4)
  np.testing.assert_allclose(loss_of("communication_loss:1:4:2", routing), 1, rtol=1e-5)
  # A router that stays below its limit of W devices is not asked to use it up.
  one_device = chosen_by(lambda t: [2 * (t % 4), 2 * (t % 4) + 1], 8, 2)
  np.testing.assert_allclose(loss_of("communication_loss:1:4:2", one_device), 1 / 2, rtol=1e-5)


def test_communication_loss_is_devices_over_m_where_the_same_m_receive_all():
  routing = chosen_by(lambda t: [0, 1, 2, 3], 8, 4)
  np.testing.assert_allclose(loss_of("communication_loss:1:4:2", routing), 4 / 2, rtol=1e-5)


def test_communication_loss_counts_a_trip_once():
  """The same device load, but device 0 receives half the tokens with two experts each, or all with one each."""
  once = chosen_by(lambda t: [0, 1] if t % 2 else [2, 3], 4, 2)
  twice = chosen_by(lambda t: [t % 2, 2 + t % 2], 4, 2)
  for routing in (once, twice):
    np.testing.assert_allclose(loss_of("device_loss:1:2", routing), 1, rtol=1e-5)
  np.testing.assert_allclose(loss_of("communication_loss:1:2:2", once), 1 / 2, rtol=1e-5)
  np.testing.assert_allclose(loss_of("communication_loss:1:2:2", twice), 1, rtol=1e-5)


# --- st_moe_loss ---


def test_st_moe_loss_is_gshards_over_groups():
  routing = routing_of("softmax", logits_of(), MASK_BL, selected("softmax", logits_of(), MASK_BL))
  # Two programs, which may sum the B*L tokens in different orders.
  expected = pytest.approx(loss_of("gshard_loss:0.5:group", routing), rel=B * L * 2.0**-23)
  assert loss_of("st_moe_loss:0.5", routing) == expected
  # Flaxformer counts all K choices instead, and does not divide by K.
  flaxformer = K * reference.load_balancing_loss(logits_of().astype(float), MASK_BL, K, "softmax", "group", 3)
  np.testing.assert_allclose(K * loss_of("switch_loss:1:group", routing), flaxformer, rtol=1e-5)
  assert abs(loss_of("st_moe_loss:1", routing) - flaxformer) > 0.5


@pytest.mark.parametrize("name", ["sequence_loss", "device_loss", "communication_loss"])
def test_losses_by_sequence_say_so(name):
  assert make_balancer(name).needs_sequences and not make_balancer(name).needs_whole_step
