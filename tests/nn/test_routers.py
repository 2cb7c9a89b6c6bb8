"""Routers with parameters of their own, through the layer: output and gradients against a loop over tokens.

MoE++ has a file of its own, tests/nn/test_zero_computation.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.nn import Context, MoE
from tests.nn.layer import randomized
from tests.reference import batch_routing, noisy_routing
from tests.reference import routing as reference

B, L, D, E, F = 3, 4, 5, 6, 4
MASK_BL = np.ones((B, L), bool)
MASK_BL[1, 3:] = False
DOMAIN_B = np.array([2, 0, 1])
KEY_B = jax.random.split(jax.random.key(3), B)
OF_GROUP_B = [jax.random.fold_in(key, 1) for key in KEY_B]  # a sequence is one group, the first
X_BLD, COTANGENT_BLD = np.random.default_rng(1).normal(size=(2, B, L, D)).astype(np.float32)
COTANGENT_BLD = COTANGENT_BLD * MASK_BL[..., None]


@functools.cache
def normals(b, *widths):
  keys = jax.random.split(OF_GROUP_B[b]) if len(widths) > 1 else [OF_GROUP_B[b]]
  return [
    np.asarray(jax.random.normal(key, (L, width)), float) for key, width in zip(keys, widths, strict=True)
  ]


def noisy_topk(w, x_TD, b):
  further = x_TD @ w["router/w_noise_DE"]
  (draw_TE,) = normals(b, E)
  return noisy_routing.noisy_topk(x_TD @ w["router/w_router_DE"], 2, [0] * E, MASK_BL[b], draw_TE, further)


def hierarchical_topk(w, x_TD, b):
  of = lambda name: x_TD @ w[f"router/{name}"]
  further = of("w_group_DP"), of("w_noise_DE"), of("w_group_noise_DP")
  draws = normals(b, 2, E)
  args = of("w_router_DE"), 4, [0] * E, MASK_BL[b], draws, *further
  return noisy_routing.hierarchical_topk(*args, groups_per_token=2)


def task_level(w, x_TD, b):
  logits_TE = np.tile(w["router/w_task_SE"][DOMAIN_B[b]], (L, 1))
  return reference.softmax_topk(logits_TE, 2, [0] * E, MASK_BL[b])


def base_assignment(w, x_TD, b):
  return batch_routing.base_assignment(x_TD @ w["router/w_router_DE"], 1, None, MASK_BL[b])


CASES = {
  "noisy_topk": (noisy_topk, 2),
  "hierarchical_topk:groups=2": (hierarchical_topk, 4),
  "task_level:tasks=3": (task_level, 2),
  "base_assignment": (base_assignment, 1),
  "base_assignment:mix=true": (base_assignment, 1),  # a E(x) + (1 - a) x
}


def loop(spec, w):
  y_BLD = np.zeros((B, L, D))
  for b in range(B):
    for entry in CASES[spec][0](w, w["x"][b], b):
      x, e = w["x"][b, entry.token], entry.expert
      if entry.valid:
        out = np.maximum(x @ w["experts/w_up_EDF"][e], 0) @ w["experts/w_down_EFD"][e]
        y_BLD[b, entry.token] += entry.weight * out + ((1 - entry.weight) * x if "mix" in spec else 0)
  return y_BLD


@pytest.mark.parametrize("spec", CASES)
def test_output_and_gradients_equal_the_loop(spec):
  sizes = {"num_experts": E, "num_experts_per_token": CASES[spec][1], "expert_dim": F, "experts": "relu"}
  moe = randomized(lambda: MoE(D, router=spec, dispatcher="dropless", rngs=nnx.Rngs(0), **sizes))
  graphdef, params, rest = nnx.split(moe, nnx.Param, ...)

  @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
  def gradients(params, x_BLD):
    context = Context(MASK_BL, KEY_B, domain_B=jnp.asarray(DOMAIN_B), num_domains=3, train=True)
    y_BLD, _ = nnx.merge(graphdef, params, rest)(x_BLD, context)
    return jnp.vdot(y_BLD, COTANGENT_BLD), y_BLD

  (d_params, d_x_BLD), y_BLD = jax.device_get(jax.jit(gradients)(params, X_BLD))
  by_path = lambda state: {"/".join(path): np.asarray(v.get_value()) for path, v in nnx.to_flat_state(state)}
  w = {name: value.astype(float) for name, value in by_path(params).items()} | {"x": X_BLD.astype(float)}
  np.testing.assert_allclose(y_BLD, loop(spec, w), rtol=1e-4, atol=1e-5)

  rng = np.random.default_rng(5)
  for name, gradient in (by_path(d_params) | {"x": d_x_BLD}).items():
    direction = rng.normal(size=gradient.shape)
    sides = [loop(spec, w | {name: w[name] + s * 1e-6 * direction}) for s in (1, -1)]
    want = np.sum((sides[0] - sides[1]) * COTANGENT_BLD) / 2e-6
    np.testing.assert_allclose(np.sum(gradient * direction), want, rtol=1e-3, atol=1e-4, err_msg=name)
    assert abs(want) > 1e-3, name
