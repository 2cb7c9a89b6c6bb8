"""Losses against those of Hugging Face transformers, and what pooling layers hides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.balancing.conventions import convert
from moe_jax.ops.routing import make_choice, to_batch
from moe_jax.ops.routing.common import in_groups
from moe_jax.types import RouterContext
from tests.ops.balancer_laws import loss_of
from tests.parity import oracles

B, L, E, K = 3, 8, 6, 2
LOGITS_BLE = oracles.normals(B, L, E, seed=1)
MASK_BL = np.ones((B, L), bool)
MASK_BL[0, 5:] = MASK_BL[2, 1:] = False


def our_loss(balancer, logits_BLE, mask_BL=None, router="softmax_topk", k=K):
  """One layer's loss by its own definition, every sequence a routing group."""
  batch, length, num_experts = logits_BLE.shape
  mask_BL = jnp.ones((batch, length), bool) if mask_BL is None else jnp.asarray(mask_BL)
  choice = make_choice(router, num_experts, k)
  routing = in_groups(choice.choose, logits_BLE, context=RouterContext(mask_BL))
  return loss_of(balancer, to_batch(routing, batch, length, k))


def value_and_gradient(balancer, logits_BLE, **kwargs):
  return jax.jit(jax.value_and_grad(lambda logits: our_loss(balancer, logits, **kwargs)))(logits_BLE)


def their_value_and_gradients(function, logits, *args):
  """The value of `function(logits, *args)`, and its gradient by each array of `logits`."""
  logits = [oracles.torch.tensor(x, requires_grad=True) for x in logits]
  loss = function(logits, *args)
  loss.backward()
  return loss.item(), [x.grad.numpy() for x in logits]


def assert_same(ours, theirs):
  """Values, and gradients by the logits."""
  (loss, gradient_BLE), (expected, (expected_BLE,)) = ours, theirs
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_allclose(gradient_BLE, expected_BLE, rtol=1e-5, atol=1e-7)
  assert np.abs(expected_BLE).max() > 1e-3


def pooled(model, k=K, mask_BL=None):
  """transformers' load-balancing loss of a list of layers' logits [B, L, E]."""
  mask = None if mask_BL is None else oracles.torch.tensor(mask_BL)

  def loss(logits):
    num_experts = logits[0].shape[-1]
    flat = tuple(x.reshape(-1, num_experts) for x in logits)
    return oracles.modeling(model).load_balancing_loss_func(flat, num_experts, k, mask)

  return loss


@pytest.mark.parametrize("mask_BL", [None, MASK_BL], ids=["whole", "padded"])
@pytest.mark.parametrize("model", ["mixtral", "qwen2_moe", "olmoe", "deepseek_v4", "nllb_moe"])
def test_one_layer_is_k_times_ours(model, mask_BL):
  """The converter's factor for one layer, for values and gradients."""
  factor = convert(1.0, "hugging_face", "moe_jax", num_experts=E, num_experts_per_token=K, num_layers=1)
  assert factor == K
  ours = value_and_gradient(f"switch_loss:{factor}", LOGITS_BLE, mask_BL=mask_BL)
  assert_same(ours, their_value_and_gradients(pooled(model, mask_BL=mask_BL), [LOGITS_BLE]))


def test_layers_that_route_alike_are_k_times_ours():
  """In all: each of ours has a third of the weight, because layers add up."""
  factor = convert(1.0, "hugging_face", "moe_jax", num_experts=E, num_experts_per_token=K, num_layers=3)
  expected, _ = their_value_and_gradients(pooled("mixtral"), [LOGITS_BLE] * 3)
  loss, _ = value_and_gradient("switch_loss:1", LOGITS_BLE)
  np.testing.assert_allclose(factor * 3 * loss, expected, rtol=1e-5)


def test_pooling_hides_collapsed_layers():
  """Every layer sends all tokens to two experts, each layer to two others. In one pool of tokens that is
  perfect balance, so the loss has its least value and pushes nowhere; layer by layer it is 3 times that."""
  layers = [0.1 * LOGITS_BLE + 9 * np.isin(np.arange(E), (2 * n, 2 * n + 1)) for n in range(3)]
  layers = [x.astype(np.float32) for x in layers]
  value, gradients = their_value_and_gradients(pooled("mixtral"), layers)
  np.testing.assert_allclose(value, K, rtol=1e-5)
  np.testing.assert_allclose(gradients, 0, atol=1e-7)

  ours = [value_and_gradient("switch_loss:1", logits_BLE) for logits_BLE in layers]
  np.testing.assert_allclose([loss for loss, _ in ours], 3, rtol=1e-2)
  assert all(np.abs(gradient_BLE).max() > 1e-6 for _, gradient_BLE in ours)
  alone = [their_value_and_gradients(pooled("mixtral"), [logits_BLE])[0] for logits_BLE in layers]
  np.testing.assert_allclose([K * loss for loss, _ in ours], alone, rtol=1e-5)


def test_the_load_balancing_loss_of_switch():
  """Its groups are sequences, so it is ours with scope=sequence."""

  def loss(logits):
    probs_BLE = logits[0].softmax(-1)
    return oracles.modeling("switch_transformers").load_balancing_loss_func(probs_BLE, probs_BLE.argmax(-1))

  ours = value_and_gradient("switch_loss:1:sequence", LOGITS_BLE, router="switch_top1", k=1)
  assert_same(ours, their_value_and_gradients(loss, [LOGITS_BLE]))
  whole, _ = value_and_gradient("switch_loss:1", LOGITS_BLE, router="switch_top1", k=1)
  assert abs(whole - ours[0]) > 0.01  # and not with the default


def test_the_router_z_loss_of_switch():
  loss = lambda logits: oracles.modeling("switch_transformers").router_z_loss_func(logits[0])
  assert_same(value_and_gradient("z_loss:1", LOGITS_BLE), their_value_and_gradients(loss, [LOGITS_BLE]))
