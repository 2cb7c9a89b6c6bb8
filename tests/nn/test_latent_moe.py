"""LatentMoE against a loop over tokens, and through a training step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.errors import InputError
from moe_jax.nn import Context
from moe_jax.nn.ffn import MLP, LatentMoE
from tests import tiny
from tests.nn.layer import randomized
from tests.reference.routing import pick, softmax

B, L, D, E, K, F, LATENT = 2, 5, 6, 4, 2, 3, 4
MASK_BL = np.ones((B, L), bool)
MASK_BL[1, 3:] = False
X_BLD, COTANGENT_BLD = np.random.default_rng(1).normal(size=(2, B, L, D)).astype(np.float32)


def make(**fields):
  sizes = {"num_experts": E, "num_experts_per_token": K, "expert_dim": F, "latent_dim": LATENT}
  fields = {"experts": "relu", "dispatcher": "dropless"} | fields
  shared = lambda rngs: MLP(D, F, "relu", rngs=rngs)
  build = lambda rngs: LatentMoE(D, shared=shared(rngs), rngs=rngs, **sizes, **fields)
  return randomized(lambda: build(nnx.Rngs(0)), scale=0.7)


def loop(w):
  """Padding goes through the shared expert only."""
  relu_ffn = lambda x, up, down: np.maximum(x @ up, 0) @ down
  y_BLD = np.zeros((B, L, D))
  for b, t in np.ndindex(B, L):
    x, latent = w["x"][b, t], np.zeros(LATENT)
    probs = softmax(x @ w["router/w_router_DE"])
    chosen = pick(probs, [0.0] * E, K)
    for e in chosen if MASK_BL[b, t] else ():
      out = relu_ffn(x @ w["w_down_DX"], w["experts/w_up_EDF"][e], w["experts/w_down_EFD"][e])
      latent += probs[e] / sum(probs[i] for i in chosen) * out
    normed = latent / np.sqrt(np.mean(latent**2) + 1e-6) * w["latent_norm/scale_D"]
    y_BLD[b, t] = normed @ w["w_up_XD"] + relu_ffn(x, w["shared/w_up_DF"], w["shared/w_down_FD"])
  return y_BLD


def test_output_and_gradients_equal_the_loop():
  graphdef, params, rest = nnx.split(make(), nnx.Param, ...)

  def value(params, x_BLD):
    y_BLD, _ = nnx.merge(graphdef, params, rest)(x_BLD, Context(MASK_BL))
    return jnp.vdot(y_BLD, COTANGENT_BLD), y_BLD

  (d_params, d_x_BLD), y_BLD = jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True))(params, X_BLD)
  by_path = lambda state: {"/".join(path): np.asarray(v.get_value()) for path, v in nnx.to_flat_state(state)}
  w = {name: value.astype(float) for name, value in by_path(params).items()} | {"x": X_BLD.astype(float)}
  np.testing.assert_allclose(y_BLD, loop(w), rtol=1e-4, atol=1e-5)
  rng = np.random.default_rng(5)
  for name, gradient in (by_path(d_params) | {"x": d_x_BLD}).items():
    direction = rng.normal(size=gradient.shape)
    sides = [loop(w | {name: w[name] + s * 1e-6 * direction}) for s in (1, -1)]
    want = np.sum((sides[0] - sides[1]) * COTANGENT_BLD) / 2e-6
    np.testing.assert_allclose(np.sum(gradient * direction), want, rtol=1e-3, atol=1e-4, err_msg=name)
    assert abs(want) > 1e-3, name


def test_a_token_that_no_expert_keeps_gets_only_the_shared_expert():
  moe = make(dispatcher="sorted", eval_capacity_factor=1e-3)  # one slot per expert
  y_BLD, aux = moe(X_BLD)
  assert aux.kept_per_expert_E.sum() <= E * B
  shared_BLD = moe.shared(jnp.asarray(X_BLD))[0]
  assert (np.abs(y_BLD - shared_BLD).max(axis=-1) == 0).sum() >= B * L - E * B


def test_a_model_trains_with_it():
  config = tiny.change(
    tiny.CONFIG, ffn="latent_moe:latent_dim=4", num_shared_experts=1, num_layers=1, jitter=0.0
  )
  result = tiny.one_step(config, tiny.make_batch())
  shapes = {path[-1]: v.get_value().shape for path, v in nnx.to_flat_state(result["gradients"])}
  assert shapes["w_down_DX"][-2:] == (16, 4) and shapes["w_gate_EDF"][-3:] == (8, 4, 16)
  for path, gradient in nnx.to_flat_state(result["gradients"]):
    assert np.abs(gradient.get_value()).max() > 0, path
  bias = jax.tree.leaves(result["balancer"])
  assert any(np.any(b) for b in bias)


def test_the_latent_width_must_be_positive():
  with pytest.raises(InputError, match="latent_dim must be at least 1, got -2"):
    LatentMoE(D, latent_dim=-2, rngs=nnx.Rngs(0))
