"""Default MoE (2504.12463) against a loop over tokens, and its averages over whole steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.errors import InputError
from moe_jax.nn import BalancerState, Context
from moe_jax.nn.aux import update_balancers
from moe_jax.nn.ffn import DefaultMoE
from tests import tiny
from tests.nn.layer import randomized
from tests.reference.routing import pick, softmax

B, L, D, E, K, F = 2, 5, 6, 4, 2, 3
MASK_BL = np.ones((B, L), bool)
MASK_BL[1, 3:] = False
X_BLD, COTANGENT_BLD = np.random.default_rng(1).normal(size=(2, B, L, D)).astype(np.float32)
COTANGENT_BLD *= MASK_BL[..., None]
AVERAGE_ED = np.random.default_rng(2).normal(size=(E, D)).astype(np.float32)


def make(average_ED=AVERAGE_ED, **fields):
  sizes = {"num_experts": E, "num_experts_per_token": K, "expert_dim": F, "router": "softmax_topk:before"}
  fields = {"experts": "relu", "dispatcher": "dropless"} | fields
  moe = randomized(lambda: DefaultMoE(D, rngs=nnx.Rngs(0), **sizes, **fields), scale=0.7)
  moe.balancer_state.set_value(moe.balancer_state.get_value() | {"average_ED": jnp.asarray(average_ED)})
  return moe


def loop(w, capacity=None):
  """The output, and the outputs of each expert for the tokens that it kept. A group is a sequence."""
  y_BLD, outputs = np.zeros((B, L, D)), [[] for _ in range(E)]
  for b in range(B):
    room = [capacity] * E
    for t in np.flatnonzero(MASK_BL[b]):
      x = w["x"][b, t]
      probs = softmax(x @ w["router/w_router_DE"])
      chosen = pick(probs, [0.0] * E, K)
      for e in range(E):
        served = e in chosen and room[e] != 0
        if served:
          outputs[e].append(np.maximum(x @ w["experts/w_up_EDF"][e], 0) @ w["experts/w_down_EFD"][e])
          room[e] = room[e] and room[e] - 1
        y_BLD[b, t] += probs[e] * (outputs[e][-1] if served else AVERAGE_ED[e].astype(float))
  return y_BLD, outputs


by_path = lambda state: {"/".join(path): np.asarray(v.get_value()) for path, v in nnx.to_flat_state(state)}


def weights_of(moe):
  return {name: v.astype(float) for name, v in by_path(nnx.state(moe, nnx.Param)).items()} | {
    "x": X_BLD.astype(float)
  }


def test_output_and_gradients_equal_the_loop():
  moe = make()
  graphdef, params, rest = nnx.split(moe, nnx.Param, ...)

  def value(params, x_BLD):
    y_BLD, _ = nnx.merge(graphdef, params, rest)(x_BLD, Context(MASK_BL))
    return jnp.vdot(y_BLD, COTANGENT_BLD), y_BLD

  (d_params, d_x_BLD), y_BLD = jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True))(params, X_BLD)
  w = weights_of(moe)
  np.testing.assert_allclose(np.where(MASK_BL[..., None], y_BLD, 0), loop(w)[0], rtol=1e-4, atol=1e-5)
  rng = np.random.default_rng(5)
  for name, gradient in (by_path(d_params) | {"x": d_x_BLD}).items():
    direction = rng.normal(size=gradient.shape)
    sides = [loop(w | {name: w[name] + s * 1e-6 * direction})[0] for s in (1, -1)]
    want = np.sum((sides[0] - sides[1]) * COTANGENT_BLD) / 2e-6
    np.testing.assert_allclose(np.sum(gradient * direction), want, rtol=1e-3, atol=1e-4, err_msg=name)
    assert abs(want) > 1e-3, name


@pytest.mark.parametrize("capacity", [None, 1])
@pytest.mark.parametrize("dispatcher", ["sorted", "einsum", "dropless"])
def test_averages_follow_the_outputs_that_experts_gave(dispatcher, capacity):
  """Also where slots run out, in the order of the layer without averages; an expert without tokens keeps its own."""
  if dispatcher == "dropless" and capacity:
    return
  factor = (capacity or L) * E / (L * K)
  moe = make(dispatcher=dispatcher, eval_capacity_factor=factor, beta=0.75, balancer="loss_free_bias:0.1")
  y_BLD, aux = jax.jit(lambda moe, x: moe(x, Context(MASK_BL)))(moe, X_BLD)
  want_BLD, outputs = loop(weights_of(moe), capacity)
  np.testing.assert_allclose(np.where(MASK_BL[..., None], y_BLD, 0), want_BLD, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(aux.kept_per_expert_E, [len(found) for found in outputs])
  update_balancers(moe, aux)
  state = moe.balancer_state.get_value()
  for e, found in enumerate(outputs):
    want = 0.75 * AVERAGE_ED[e] + 0.25 * np.mean(found, axis=0) if found else AVERAGE_ED[e]
    np.testing.assert_allclose(state["average_ED"][e], want, rtol=1e-4, atol=1e-5)
  assert np.any(state["balancer"][0])


def test_an_expert_without_tokens_keeps_its_average():
  moe = make()
  _, aux = jax.jit(lambda: moe(X_BLD, Context(np.zeros((B, L), bool))))()
  update_balancers(moe, aux)
  np.testing.assert_array_equal(moe.balancer_state.get_value()["average_ED"], AVERAGE_ED)


def test_experts_that_no_token_chose_reach_the_router_only_through_their_averages():
  """A bias keeps all tokens from two experts. Their columns of the router's gradient depend on the averages."""

  @jax.jit
  def gradient(average_ED):
    moe = make(average_ED, balancer="loss_free_bias")
    bias = {"balancer": (jnp.array([9.0, 9.0, 0.0, 0.0]),)}
    moe.balancer_state.set_value(moe.balancer_state.get_value() | bias)
    graphdef, params, rest = nnx.split(moe, nnx.Param, ...)

    def value(params):
      y_BLD, aux = nnx.merge(graphdef, params, rest)(X_BLD, Context(MASK_BL))
      return jnp.vdot(y_BLD, COTANGENT_BLD), aux.tokens_per_expert_BE.sum(axis=0)

    found, counts_E = jax.grad(value, has_aux=True)(params)
    return found.router.w_router_DE.get_value(), counts_E

  gradients = {e: gradient(AVERAGE_ED * np.eye(E, dtype=np.float32)[e][:, None])[0] for e in (2, 3)}
  without_DE, counts_E = gradient(0 * AVERAGE_ED)
  np.testing.assert_array_equal(counts_E[2:], 0)
  for e, gradient_DE in gradients.items():
    assert np.abs(gradient_DE - without_DE)[:, e].max() > 0.01


@functools.cache
def one_step(**fields):
  config = tiny.change(
    tiny.CONFIG,
    ffn="default_moe:beta=0.5",
    router="softmax_topk:before",
    dispatcher="dropless",
    jitter=0.0,
    **fields,
  )
  return tiny.one_step(config, tiny.make_batch())


def test_a_step_is_the_same_in_micro_batches():
  """The averages are those of the whole step. Sums in another order round differently."""
  whole, cut = one_step(), one_step(accumulation=2)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, whole["balancer"], cut["balancer"])
  jax.tree.map(close, whole["gradients"], cut["gradients"])
  averages = [v for v in jax.tree.leaves(whole["balancer"]) if v.ndim == 3]
  assert [v.shape for v in averages] == [(2, 8, 16)] and np.abs(averages[0]).max(axis=-1).min() > 0


def test_averages_are_no_parameters():
  state = nnx.state(make(), BalancerState)
  assert any(leaf.shape == (E, D) for leaf in jax.tree.leaves(state))
  with pytest.raises(InputError, match=r"beta must be in \[0, 1\), got 1"):
    make(beta=1.0)
