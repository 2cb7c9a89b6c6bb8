"""A router that prefers some experts, which a bias alone must balance."""

import functools

import jax
import numpy as np

from moe_jax.ops import stats
from moe_jax.ops.balancing import make_balancer
from moe_jax.ops.routing import make_choice, to_batch
from moe_jax.ops.routing.common import in_groups
from moe_jax.types import RouterContext
from tests.ops.balancer_rows import K

SKEWED_EXPERTS = 8


def route_batch(router, logits_BLE, mask_BL, bias_E=None):
  """The routing as the layer makes it, one group per sequence."""
  choice = make_choice(router, logits_BLE.shape[-1], K)
  routing = in_groups(choice.choose, logits_BLE, context=RouterContext(mask_BL, bias_E))
  return to_batch(routing, *mask_BL.shape, K)


@functools.cache
def skewed_run(spec, num_steps=400, router="sigmoid_topk"):
  """MaxVio [steps] and bias [steps, E] of the balancer `spec` on the same batch at every step: weights never
  move."""
  noise_BLE = np.random.default_rng(0).normal(size=(4, 32, SKEWED_EXPERTS)).astype(np.float32)
  logits_BLE = noise_BLE + np.linspace(2, -2, SKEWED_EXPERTS).astype(np.float32)
  mask_BL = np.ones((4, 32), bool)
  balancer = make_balancer(spec)

  def step(state, _):
    routing = route_batch(router, logits_BLE, mask_BL, balancer.bias(state))
    counts_E = routing.selected_BLE.sum(axis=(0, 1))
    new_state = balancer.update(state, balancer.observe(state, routing))
    return new_state, (stats.max_vio(counts_E), balancer.bias(state))

  run = jax.jit(lambda state: jax.lax.scan(step, state, length=num_steps)[1])
  return jax.tree.map(np.asarray, run(balancer.init(SKEWED_EXPERTS)))
