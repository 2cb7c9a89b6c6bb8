"""An MoE layer with zero-computation experts (MoE++, 2410.07348) against a loop over tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.nn import Context, MoE
from tests import tiny
from tests.nn.layer import float64, randomized
from tests.reference.routing import assert_gradients, pick, softmax

B, L, D, E, K, F = 2, 6, 5, 3, 3, 4
ROUTER = "moe_plus_plus:zeros=1:copies=1:constants=2"
KINDS = ("zero", "copy", "constant", "constant")
MASK_BL = np.ones((B, L), bool)
MASK_BL[1, 4:] = False


def make(**fields):
  """A layer with random weights, larger than at the start so that every part shows."""
  sizes = {"num_experts": E, "num_experts_per_token": K, "expert_dim": F}
  fields = {"dispatcher": "dropless", "router": ROUTER, "experts": "relu"} | fields
  return randomized(lambda: MoE(D, rngs=nnx.Rngs(0), **sizes, **fields), scale=1.0)


def parameters(moe):
  return {
    "router": moe.router.w_router_DE,
    "up": moe.experts.w_up_EDF,
    "down": moe.experts.w_down_EFD,
    "vector": moe.router.zero_computation.vector_ZD,
    "mix": moe.router.zero_computation.w_mix_DZ2,
  }


def values(moe):
  return {name: float64(v) for name, v in parameters(moe).items()}


def inputs():
  return np.random.default_rng(1).normal(size=(B, L, D)).astype(np.float32)


def loop(w, x_BLD, capacity=None):
  """The layer with the formulas of the paper, a token after the other, and what each expert was sent and kept."""
  y_BLD = np.zeros(x_BLD.shape)
  sent_BE, kept_E = np.zeros((B, E + len(KINDS))), np.zeros(E + len(KINDS))
  for b in range(B):
    room = [capacity] * E
    for t in range(L):
      if not MASK_BL[b, t]:
        continue
      x = x_BLD[b, t]
      probs = softmax(x @ w["router"])
      for e in pick(probs, [0.0] * len(probs), K):
        sent_BE[b, e] += 1
        if e < E and capacity is not None:
          room[e] -= 1
          if room[e] < 0:
            continue
        kept_E[e] += 1
        y_BLD[b, t] += probs[e] * expert(w, e, x)
  return y_BLD, sent_BE, kept_E


def expert(w, e, x):
  if e < E:
    return np.maximum(x @ w["up"][e], 0) @ w["down"][e]
  kind = KINDS[e - E]
  if kind == "zero":
    return 0 * x
  if kind == "copy":
    return x
  c = e - E - KINDS.index("constant")
  first, second = softmax(x @ w["mix"][:, c])
  return first * x + second * w["vector"][c]


@functools.partial(jax.jit, static_argnames="graphdef")
def run(graphdef, state, x_BLD, cotangent_BLD):
  def loss(state, x_BLD):
    y_BLD, aux = nnx.merge(graphdef, state)(x_BLD, Context(MASK_BL, train=True))
    return jnp.sum(y_BLD * cotangent_BLD), (y_BLD, aux)

  return jax.grad(loss, argnums=(0, 1), has_aux=True)(state, x_BLD)


def test_output_counts_and_gradients_equal_the_loop():
  moe, x_BLD = make(), inputs()
  cotangent_BLD = np.random.default_rng(2).normal(size=x_BLD.shape).astype(np.float32)
  (d_state, d_x_BLD), (y_BLD, aux) = run(*nnx.split(moe), x_BLD, cotangent_BLD)
  w = values(moe)
  want_BLD, sent_BE, kept_E = loop(w, x_BLD.astype(np.float64))
  assert (sent_BE.sum(axis=0) > 0).all()  # every kind is used
  np.testing.assert_allclose(y_BLD, want_BLD, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(aux.tokens_per_expert_BE, sent_BE)
  np.testing.assert_array_equal(aux.kept_per_expert_E, kept_E)

  gradients = values(nnx.merge(nnx.graphdef(moe), d_state)) | {"x": np.asarray(d_x_BLD)}
  loss = lambda w: np.sum(loop(w, w["x"])[0] * cotangent_BLD)
  assert_gradients(loss, w | {"x": x_BLD.astype(np.float64)}, gradients, at_least=0.01, directions=3)


@pytest.mark.parametrize("dispatcher", ["sorted", "einsum"])
def test_drops_do_not_touch_zero_computation_experts(dispatcher):
  """Capacity 1 for each feed-forward expert; all others keep everything."""
  moe, x_BLD = make(dispatcher=dispatcher, capacity_factor=E / (L * K)), inputs()
  _, (y_BLD, aux) = run(*nnx.split(moe), x_BLD, np.zeros_like(x_BLD))
  want_BLD, sent_BE, kept_E = loop(values(moe), x_BLD.astype(np.float64), capacity=1)
  assert (kept_E[:E] < sent_BE.sum(axis=0)[:E]).all()
  np.testing.assert_allclose(y_BLD, want_BLD, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(aux.kept_per_expert_E, kept_E)
  np.testing.assert_array_equal(aux.tokens_per_expert_BE, sent_BE)


def test_a_loss_free_bias_moves_tokens_to_zero_computation_experts():
  moe, x_BLD = make(balancer="loss_free_bias"), inputs()
  bias_E = np.zeros(E + len(KINDS), np.float32)
  bias_E[E:] = 10
  moe.balancer_state.set_value((jnp.asarray(bias_E),))
  _, (_, aux) = run(*nnx.split(moe), x_BLD, np.zeros_like(x_BLD))
  assert aux.tokens_per_expert_BE[:, :E].sum() == 0
  assert aux.tokens_per_expert_BE.sum() == K * MASK_BL.sum()


def test_only_constant_experts_have_parameters():
  router = make(router="moe_plus_plus:constants=0").router
  assert not jax.tree.leaves(nnx.state(router.zero_computation))
  assert router.w_router_DE.get_value().shape == (D, E + 2)


def test_a_model_trains_with_it():
  """Balancers, metrics and parameters reach from the feed-forward experts to the others."""
  config = tiny.change(
    tiny.CONFIG,
    router="moe_plus_plus",
    num_layers=1,
    balancers="heterogeneous_loss:0.1,loss_free_bias:0.01",
    capacity_factor=0.5,
    jitter=0.0,
  )
  result = tiny.one_step(config, tiny.make_batch())
  counts_RE = result["metrics"]["tokens_per_expert"]
  assert counts_RE.shape == (1, 8 + 4) and (counts_RE[:, 8:].sum(axis=-1) > 0).all()
  assert counts_RE.sum() == 2 * tiny.make_batch()["mask_BL"].sum()
  assert result["metrics"]["dropped_fraction"] > 0
  moved = {
    jax.tree_util.keystr(p): np.abs(g).max() for p, g in jax.tree.leaves_with_path(result["gradients"])
  }
  of_others = [size for name, size in moved.items() if "'zero_computation'" in name]
  assert len(of_others) == 2 and min(of_others) > 0
