"""Routers with parameters of their own, through the layer: output and gradients against a loop over tokens.

MoE++ has a file of its own, tests/nn/test_zero_computation.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.errors import InputError
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


def tokens(choose, logits_TE, b):
  """`choose(logits_E, scores_E)` -> {expert: weight}, token after token."""
  entries = []
  for t, logits_E in enumerate(logits_TE):
    real = bool(MASK_BL[b, t])
    entries += [reference.Entry(t, e, w, real, real) for e, w in choose(logits_E).items()]
  return entries


def best(k, scores_E):
  """{expert: score} of the k best."""
  return {e: scores_E[e] for e in reference.pick(scores_E, [0] * E, k)}


def over_sum(chosen):
  return {e: s / sum(chosen.values()) for e, s in chosen.items()}


def cosine_topk(w, x_TD, b):
  unit = lambda x: x / np.sqrt((x * x).sum())
  inverse_temperature = min(np.exp(w["router/log_inverse_temperature"]), 100)
  vectors = [unit(v) for v in w["router/w_expert_XE"].T]
  logits_TE = [[inverse_temperature * unit(x @ w["router/w_token_DX"]) @ v for v in vectors] for x in x_TD]
  return tokens(lambda logits_E: best(2, reference.softmax(logits_E)), logits_TE, b)


def mlp_topk(w, x_TD, b):
  logits_TE = np.tanh(x_TD @ w["router/w_in_DX"]) @ w["router/w_out_XE"]
  return tokens(lambda logits_E: over_sum(best(3, reference.sigmoid(logits_E))), logits_TE, b)


def gemma4_topk(w, x_TD, b):
  rms_T = [np.sqrt((x * x).sum() / D + 1e-6) for x in x_TD]
  logits_TE = [
    (x / rms * w["router/scale_D"] / np.sqrt(D)) @ w["router/w_router_DE"] for x, rms in zip(x_TD, rms_T)
  ]
  scaled = lambda chosen: {e: s * w["router/scale_E"][e] for e, s in chosen.items()}
  return tokens(lambda logits_E: scaled(over_sum(best(2, reference.softmax(logits_E)))), logits_TE, b)


def gpt_oss_topk(w, x_TD, b):
  logits_TE = x_TD @ w["router/w_router_DE"] + w["router/b_router_E"]
  over_chosen = lambda chosen: over_sum({e: np.exp(x) for e, x in chosen.items()})
  return tokens(lambda logits_E: over_chosen(best(2, logits_E)), logits_TE, b)


CASES = {
  "noisy_topk": (noisy_topk, 2),
  "hierarchical_topk:groups=2": (hierarchical_topk, 4),
  "task_level:tasks=3": (task_level, 2),
  "base_assignment": (base_assignment, 1),
  "base_assignment:mix=true": (base_assignment, 1),  # a E(x) + (1 - a) x
  "cosine_topk": (cosine_topk, 2),
  "mlp_topk:hidden=7:activation=tanh:score=sigmoid": (mlp_topk, 3),
  "gemma4_topk": (gemma4_topk, 2),
  "gpt_oss_topk": (gpt_oss_topk, 2),
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

  loss = lambda w: np.sum(loop(spec, w) * COTANGENT_BLD)
  reference.assert_gradients(loss, w, by_path(d_params) | {"x": d_x_BLD}, at_least=1e-3)


def layer(spec, **fields):
  return MoE(D, num_experts=E, expert_dim=F, router=spec, dispatcher="dropless", rngs=nnx.Rngs(0), **fields)


def test_a_router_by_task_needs_the_domains():
  with pytest.raises(InputError, match="reads the domain of each sequence"):
    layer("task_level:3")(X_BLD)


def test_sequences_of_a_group_are_routed_each_on_its_own():
  mask_BL = np.arange(L)[None] < np.array([[3], [1], [0]])
  layers = [layer("sequence_level", group_size=size) for size in (0, B * L)]
  alone, together = jax.jit(lambda: [moe(X_BLD, Context(mask_BL=mask_BL))[0] for moe in layers])()
  assert np.abs(alone).max() > 0.01
  np.testing.assert_allclose(together, alone, atol=1e-6)
  with pytest.raises(InputError, match=f"multiple of sequence_length={L}"):
    layer("sequence_level", group_size=3)(X_BLD)


def test_the_temperature_of_a_cosine_router_is_at_least_a_hundredth():
  router = layer("cosine_topk:temperature=0.25").router
  widest = lambda: float(np.abs(router.logits(X_BLD)).max())
  before, expected = widest(), [1.0, 0.04, 25.0, 25.0]  # temperatures 0.25, 6.25, 0.01 and far below
  found = []
  for log_inverse in (np.log(4), np.log(0.16), np.log(100), 50.0):
    router.log_inverse_temperature.set_value(np.float32(log_inverse))
    found.append(widest() / before)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  assert 2 < before <= 4  # 1/0.25 times a cosine
  assert router.w_expert_XE.shape == (E // 2, E)


def test_a_token_of_zeros_has_finite_gradients_in_a_cosine_router():
  router = layer("cosine_topk").router
  assert np.isfinite(jax.grad(lambda x: router.logits(x).sum())(np.zeros_like(X_BLD))).all()


def test_what_weights_multiply_is_one_of_two():
  router = layer("sigmoid_topk").router
  router.weighs = "hidden"
  with pytest.raises(InputError, match="weighs must be one of output, input, got 'hidden'"):
    layer(router)


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ("cosine_topk:width=-1", "width must be 1 or more, or 0 for half the experts, got -1"),
    ("cosine_topk:temperature=0.001", "temperature must be 0.01 or more, got 0.001"),
    ("cosine_topk:score=tanh", "router cosine_topk: score must be one of softmax, sigmoid, sqrt_softplus"),
    ("mlp_topk:hidden=-2", "hidden must be 1 or more, or 0 for the model dimension, got -2"),
    ("mlp_topk:activation=sin", "activation must be one of relu, gelu, silu, tanh, got 'sin'"),
  ],
)
def test_wrong_options_are_one_line_errors(spec, message):
  with pytest.raises(InputError) as error:
    layer(spec)
  assert message in str(error.value) and "\n" not in str(error.value)
