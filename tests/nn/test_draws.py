"""What an MoE layer draws: by sequence, independently, and only in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.nn import Context
from moe_jax.nn.routers import Router
from moe_jax.ops.routing import make_choice
from moe_jax.ops.routing.common import in_groups
from tests.nn.layer import FIELDS, B, D, F, forward, inputs, keys, make


def test_jitter_is_in_the_router_input_of_training_only():
  """With one expert, one feature and x = w = 1, the z-loss is the mean of the squared jitter."""
  sizes = {"num_experts": 1, "num_experts_per_token": 1}
  moe = make(1, balancer="z_loss:1", dispatcher="dropless", jitter=0.5, **sizes)
  moe.router.w_router_DE.set_value(np.ones((1, 1), np.float32))
  x_BLD = np.ones((B, 300, 1), np.float32)
  y_BLD, aux = forward(moe, x_BLD, key_B=keys(), train=True)
  np.testing.assert_allclose(aux.losses["z_loss"], 1 + 0.5**2 / 3, atol=0.05)
  for without in ({"train": True}, {"key_B": keys()}):
    plain_BLD, aux = forward(moe, x_BLD, **without)
    # Another program, whose sums over B*300 tokens and F hidden units may round otherwise.
    assert aux.losses["z_loss"] == pytest.approx(1, rel=B * 300 * 2.0**-23)
    # Experts see what is not jittered.
    np.testing.assert_allclose(plain_BLD, y_BLD, atol=F * 2.0**-23 * np.abs(y_BLD).max())


def test_draws_belong_to_sequences():
  """Sequences in another order, with their keys, give the same outputs in that order."""
  moe = make(jitter=0.5, router="gshard_top2", capacity_factor=8.0)
  x_BLD, key_data, order = inputs(), keys(), np.array([2, 0, 1])
  y_BLD, _ = forward(moe, x_BLD, key_B=key_data, train=True)
  permuted, _ = forward(moe, x_BLD[order], key_B=key_data[order], train=True)
  # At another place of a product a row's F or D terms may be summed in another order: that many roundings by 2**-24.
  np.testing.assert_allclose(permuted, y_BLD[order], atol=(D + F) * 2.0**-23 * np.abs(y_BLD).max())
  other, _ = forward(moe, x_BLD, key_B=keys(seed=2), train=True)
  assert np.abs(other - y_BLD).max() > 1e-3


class DrawsAndInputs(Router):
  """Its logits are the router's first input feature, and what the key of the group gives."""

  def __init__(self):
    self.choose = make_choice("softmax_topk", 2, 1).choose

  def __call__(self, x_GTD, context):
    noise_GT = jax.vmap(lambda key: jax.random.uniform(key, x_GTD.shape[1:2]))(context.key)
    return in_groups(self.choose, jnp.stack([x_GTD[..., 0], noise_GT], axis=-1), context=context)


def test_jitter_groups_and_layers_draw_independently():
  """Sixteen streams of 256 numbers: jitter and noise, by half of a sequence, sequence and layer."""
  sizes = {"num_experts": 2, "num_experts_per_token": 1, "dispatcher": "dropless"}
  moe = make(1, router=DrawsAndInputs(), balancer="none", jitter=0.9, group_size=256, **sizes)
  context = Context(key_B=jax.random.split(jax.random.key(0), 2), train=True, record_logits=True)
  run = jax.jit(lambda layer: moe(jnp.ones((2, 512, 1)), context.of_layer(layer, None))[1].logits_BLE)
  streams = np.stack([run(layer) for layer in range(2)])  # [layer, B, L, 2]
  streams = streams.reshape(2, 2, 2, 256, 2).swapaxes(3, 4).reshape(16, 256)
  between = np.corrcoef(streams) - np.eye(16)
  assert np.abs(between).max() < 0.3, between  # 5 standard deviations


def test_nothing_draws_in_evaluation_whatever_keys_are_given():
  """For each method that draws in training: jitter, routers, experts."""
  methods = [{"router": r} for r in ("noisy_topk", "vmoe_topk", "gshard_top2", "st_moe_topn")]
  methods += [{"jitter": 0.5}, {"experts": "expert_dropout"}, {"router": "hierarchical_topk:groups=2"}]
  layers = [make(**FIELDS | {"balancer": "none", "capacity_factor": 8.0} | method) for method in methods]
  graphdef, state = nnx.split(nnx.List(layers))

  @jax.jit
  def run(state, x_BLD, keys_B):
    given = Context(key_B=keys_B, step_key=keys_B[0])
    contexts = (Context(), given, Context(train=True), given._replace(train=True))
    layers = nnx.merge(graphdef, state)
    return [[layer(x_BLD, context)[0] for context in contexts] for layer in layers]

  for method, ys in zip(methods, run(state, inputs(), jax.random.split(jax.random.key(0), B)), strict=True):
    plain, with_keys, without_keys, drawn = map(np.asarray, ys)
    np.testing.assert_array_equal(with_keys, plain, err_msg=str(method))
    assert np.abs(drawn - without_keys).max() > 1e-3, method
